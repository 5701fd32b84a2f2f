"""A home that gets another public address in the middle of a text: client, hop or relay, behind any router.

One lab has two homes of every kind, as for the pairs. In a round every kind is once the node's and once the
client's; when all texts have begun, one side of every pair gets another address, all at about the same time.
What is measured is how long each text pauses, and when a client that is new finds the node again.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Final, Literal, Protocol

from tests.chaos.requests import tokenizer

from .commands import Command, Commands
from .pairs import PROMPT, leave, reachable, rounds, start_relays
from .pinned import POLICY, VARIABLE, write_routes
from .reference import greedy_ids
from .scenarios import site_name

Mover = Literal["client", "hop", "relay"]

MEASURED: Final = Path(__file__).with_name("moved.json")
BEGIN: Final = "<!-- make lab-moves writes from here -->"
END: Final = "<!-- moves to here -->"
KINDS: Final = ("public", "port-preserving", "symmetric", "UPnP")
TOKENS: Final = 120
BEGUN_BYTES: Final = 60  # of the text, when the address changes
PATIENCE_S: Final = 90.0
LOOK_S: Final = 0.02
PROMISED_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class Move:
    """One change of address.

    Attributes:
        pause_s: The longest time without a token after it.
        found_s: From the change until a new client had a text from the node; None if nobody looked.
        why: What went wrong.
    """

    mover: Mover
    node: str
    client: str
    pause_s: float
    found_s: float | None = None
    why: str = ""

    @property
    def is_right(self) -> bool:
        """True if it went as promised."""
        return not self.why and self.pause_s <= PROMISED_S and (self.found_s or 0.0) <= PROMISED_S


class Text:
    """A generation whose output is watched as it grows."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.longest_s = 0.0
        self._grew_at = 0.0
        self._size = 0

    def size(self) -> int:
        """Bytes of the text so far."""
        return (self.command.folder / "stdout").stat().st_size

    def begin(self) -> None:
        """Measure from now on."""
        self.longest_s = 0.0
        self._grew_at, self._size = time.monotonic(), self.size()

    @property
    def is_done(self) -> bool:
        """True if the process has ended."""
        return self.command.exit_code is not None

    def look(self) -> None:
        """Note how long it has been still."""
        self.command.poll()
        now, size = time.monotonic(), self.size()
        if self.command.exit_code is None or size > self._size:
            self.longest_s = max(self.longest_s, now - self._grew_at)
        if size > self._size:
            self._grew_at, self._size = now, size


class Begun:
    """The beginning of a text."""

    def __init__(self, text: Text) -> None:
        self._text = text

    @property
    def is_done(self) -> bool:
        """True if there is enough of it to be interrupted."""
        return self._text.is_done or self._text.size() > BEGUN_BYTES

    def look(self) -> None:
        """Take in if it has ended."""
        self._text.look()


def every_move(kinds: Sequence[str] = KINDS) -> list[tuple[Mover, list[tuple[str, str]]]]:
    """Rounds with every pair of these kinds, each side in turn, and a relay between two that need one."""
    sides: tuple[Mover, ...] = ("hop", "client")
    found: list[tuple[Mover, list[tuple[str, str]]]]
    found = [(mover, pairs) for mover in sides for pairs in rounds(kinds)]
    if "symmetric" in kinds:
        found.append(("relay", [("symmetric", "symmetric")]))
    return found


def measure_moves(
    commands: Commands, kinds: Sequence[str] = KINDS, before: Sequence[Move] = (), most: int | None = None
) -> Iterator[Move]:
    """The rounds of `every_move` in which a pair lacks a move among those of `before`; at most so many."""
    had = Counter((move.mover, move.node, move.client) for move in before)
    lacking = [each for each in every_move(kinds) if any(not had[each[0], *pair] for pair in each[1])]
    relays = start_relays(commands)
    nodes = {kind: commands.node(site_name("a", kind), "--blocks", "0:8", *relays) for kind in kinds}
    try:
        ids = {kind: reachable(node) for kind, node in nodes.items()}
        for mover, pairs in lacking[:most]:
            yield from _round(commands, mover, pairs, ids, relays)
    finally:
        leave(nodes.values())


def load(path: Path = MEASURED) -> list[Move]:
    """The moves as they were kept."""
    if not path.exists():
        return []
    return [Move(**move) for move in json.loads(path.read_text(encoding="utf-8"))]


def keep(moves: Sequence[Move], path: Path = MEASURED) -> None:
    """Keep the moves, one a line, so that a change shows as one."""
    lines = ",\n".join(json.dumps(asdict(move)) for move in moves)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def shortcomings(moves: Sequence[Move], kinds: Sequence[str] = KINDS) -> list[str]:
    """What of the requirements these moves do not show, a line each."""
    made = {(move.mover, move.node, move.client) for move in moves}
    missing = [
        f"{mover} moves: {node} and {client} not run"
        for mover, pairs in every_move(kinds)
        for node, client in pairs
        if (mover, node, client) not in made
    ]
    return missing + [describe(move) for move in moves if not move.is_right]


def _round(
    commands: Commands,
    mover: Mover,
    pairs: Sequence[tuple[str, str]],
    ids: dict[str, str],
    relays: Sequence[str],
) -> Iterator[Move]:
    texts = {
        pair: Text(_generate(commands, site_name("b", pair[1]), ids[pair[0]], TOKENS, relays))
        for pair in pairs
    }
    _wait([Begun(text) for text in texts.values()])
    for node, client in pairs:
        site = {"hop": site_name("a", node), "client": site_name("b", client), "relay": "relay1"}[mover]
        commands.lab.change_address(site)
    moved_at = time.monotonic()
    for text in texts.values():
        text.begin()
    finders = {
        pair: Finder(commands, ids[pair[0]], relays, moved_at) for pair in pairs if mover in ("hop", "relay")
    }
    _wait([*texts.values()], [*finders.values()])
    _wait([*finders.values()])
    expected = tokenizer().decode(greedy_ids(PROMPT, TOKENS))
    for pair, text in texts.items():
        why = ""
        if text.command.exit_code != 0:
            why = (text.command.err.strip().splitlines() or ["still running"])[-1]
            text.command.kill()
        elif text.command.out.strip() != expected.strip():
            why = f"wrong text: {text.command.out!r}"
        finder = finders.get(pair)
        yield Move(mover, *pair, round(text.longest_s, 2), finder.found_s if finder else None, why)


class Finder:
    """A client that knows nothing yet and looks for a node, again and again until it has a text from it."""

    def __init__(self, commands: Commands, peer_id: str, relays: Sequence[str], since: float) -> None:
        self.found_s: float | None = None
        self._commands = commands
        self._peer_id = peer_id
        self._relays = relays
        self._since = since
        self._try()

    @property
    def is_done(self) -> bool:
        """True if it has found the node."""
        return self.found_s is not None

    def look(self) -> None:
        """Try again if the last try has failed."""
        self._client.poll()
        if self.found_s is None and self._client.exit_code is not None:
            if self._client.exit_code == 0:
                self.found_s = round(time.monotonic() - self._since, 2)
            else:
                self._try()

    def _try(self) -> None:
        self._client = _generate(self._commands, "c", self._peer_id, 1, self._relays, find_s=3)


def _generate(
    commands: Commands, host: str, peer_id: str, tokens: int, relays: Sequence[str], find_s: int = 30
) -> Command:
    return commands.start(
        host,
        "generate",
        *relays,
        *("--max-new-tokens", str(tokens), "--policy", POLICY, "--temperature", "0", "--audit-rate", "0"),
        *(
            "--set",
            f"client.find_timeout_s={find_s}",
            "--set",
            "client.dtype=float32",
            "--log-level",
            "debug",
        ),
        PROMPT,
        **{VARIABLE: write_routes([(peer_id, "0:8")])},
    )


class Watched(Protocol):
    """Something that is looked at again and again until it is done."""

    @property
    def is_done(self) -> bool: ...
    def look(self) -> None: ...


def _wait(watched: Sequence[Watched], more: Sequence[Watched] = ()) -> None:
    """Look at all of them until those of `watched` are done, for `PATIENCE_S` at most."""
    until = time.monotonic() + PATIENCE_S
    while not all(each.is_done for each in watched) and time.monotonic() < until:
        for each in (*watched, *more):
            each.look()
        time.sleep(LOOK_S)


def describe(move: Move) -> str:
    """One line."""
    found = "" if move.found_s is None else f", found again after {move.found_s:.1f} s"
    pair = f"{move.mover:7} node {move.node:16} client {move.client:16}"
    return f"{pair} pause {move.pause_s:5.1f} s{found} {move.why}"


def render(moves: Sequence[Move]) -> str:
    """The table for docs/nat.md."""
    lines: list[str] = []
    for mover in ("client", "hop", "relay"):
        these = [move for move in moves if move.mover == mover]
        if not these:
            continue
        clients = list(dict.fromkeys(move.client for move in these))
        lines += [
            f"| {mover} moves: node \\ client | {' | '.join(clients)} |",
            f"| --- |{' ---: |' * len(clients)}",
        ]
        for node in dict.fromkeys(move.node for move in these):
            cells = [_cell([m for m in these if (m.node, m.client) == (node, client)]) for client in clients]
            lines.append(f"| {node} | {' | '.join(cells)} |")
        lines.append("")
    right = sum(not move.why for move in moves)
    pauses = [move.pause_s for move in moves if not move.why]
    lines.append(
        f"{len(moves)} texts, {right} of them right; pauses of {median(pauses):.1f} s in the median, "
        f"{max(pauses):.1f} at most."
    )
    return "\n".join(lines)


def _cell(moves: Sequence[Move]) -> str:
    if not moves:
        return ""
    if any(move.why for move in moves):
        return "failed"
    found = [move.found_s for move in moves if move.found_s is not None]
    return f"{median(move.pause_s for move in moves):.1f}" + (f" / {median(found):.1f}" if found else "")
