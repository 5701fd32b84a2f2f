"""Every pair of kinds, as node and client and as neighbouring hops: how they got connected, and when.

One lab has two homes of every kind. In a round, every kind is once on the left and once on the right, so all
pairs take as many rounds as there are kinds, and three runs of a round for every core go on at the same
time. What is measured is what each process saw itself (witness.py), since it first asked for the other.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

from .commands import Command, Commands, bootstrap
from .pinned import POLICY, VARIABLE, WrittenRoute, write_routes
from .reference import greedy_ids
from .scenarios import KINDS, RELAY_PORT, RELAYS, site_name

Role = Literal["client", "hops"]

PROMPT = "Once upon a time"
TOKENS = 48  # long enough for a relayed edge to become direct meanwhile
RUNS_A_CORE = 3
PATIENCE_S = 45.0  # for one generation


@dataclass(frozen=True, slots=True)
class Run:
    """One attempt of two kinds to work together.

    Attributes:
        role: `client`: `left` is a node and `right` a client; `hops`: `left` sends to its successor `right`.
        how: What the edge was at the end of the generation; `failed` if there was no text, or a wrong one.
        first_s: From the first contact to the first connection, of whatever sort.
        direct_s: From the first contact to a direct connection; None if there was none.
        start_s: From the start of the process that dials to the connection that was there at the end.
        why: What went wrong.
    """

    role: Role
    left: str
    right: str
    how: Literal["direct", "relayed", "failed"]
    first_s: float | None = None
    direct_s: float | None = None
    start_s: float | None = None
    why: str = ""


class Bench:
    """Runs pairs in the `all-pairs` lab, with the relays running."""

    def __init__(self, commands: Commands, kinds: Sequence[str] = tuple(KINDS)) -> None:
        self.is_wanted: Callable[[Role, str, str], bool] = lambda role, left, right: True
        self._at_once = RUNS_A_CORE * (os.cpu_count() or 1)
        self._commands = commands
        self._kinds = kinds
        self._expected = greedy_ids(PROMPT, TOKENS)
        self._relays = start_relays(commands)

    def client_rounds(self) -> Iterator[Run]:
        """Every pair once as node and client; the nodes stay, the clients are new in every run."""
        nodes = {kind: self._node(site_name("a", kind), "0:8") for kind in self._kinds}
        try:
            ids = {kind: reachable(node) for kind, node in nodes.items()}
            for pairs in self._batches("client"):
                clients = {
                    pair: self._generate(site_name("b", pair[1]), [(ids[pair[0]], "0:8")]) for pair in pairs
                }
                for (left, right), client in clients.items():
                    yield self._judge("client", left, right, client, client, ids[left])
        finally:
            leave(nodes.values())

    def hop_rounds(self) -> Iterator[Run]:
        """Every pair once as neighbouring hops; all nodes are new in every round, and so is the edge."""
        for pairs in self._batches("hops"):
            lefts = {pair: self._node(site_name("a", pair[0]), "0:4") for pair in pairs}
            rights = {pair: self._node(site_name("b", pair[1]), "4:8") for pair in pairs}
            try:
                ids = {pair: (reachable(lefts[pair]), reachable(rights[pair])) for pair in pairs}
                clients = {
                    pair: self._generate("c", [(one, "0:4"), (other, "4:8")])
                    for pair, (one, other) in ids.items()
                }
                for pair, client in clients.items():
                    yield self._judge("hops", *pair, client, lefts[pair], ids[pair][1])
            finally:
                leave([*lefts.values(), *rights.values()])

    def _batches(self, role: Role) -> Iterator[list[tuple[str, str]]]:
        """All pairs that are wanted, those that are run at the same time together."""
        for pairs in rounds(self._kinds):
            wanted = [pair for pair in pairs if self.is_wanted(role, *pair)]
            for at in range(0, len(wanted), self._at_once):
                yield wanted[at : at + self._at_once]

    def _node(self, host: str, blocks: str) -> Command:
        return self._commands.node(host, "--blocks", blocks, *self._relays)

    def _generate(self, host: str, route: WrittenRoute) -> Command:
        return generate(self._commands, host, TOKENS, [route], self._relays)

    def _judge(
        self, role: Role, left: str, right: str, client: Command, dialler: Command, peer_id: str
    ) -> Run:
        failed = partial(Run, role, left, right, "failed")
        try:
            code = client.wait(PATIENCE_S)
        except TimeoutError as exc:
            client.kill()
            return failed(why=str(exc))
        if code != 0:
            return failed(why=client.err.strip().splitlines()[-1] if client.err else f"exit code {code}")
        result = json.loads(client.out)
        if tuple(result["token_ids"]) != self._expected:
            return failed(why=f"wrong text: {result['text']!r}")
        return timed(role, left, right, dialler, peer_id)


def timed(role: Role, left: str, right: str, dialler: Command, peer_id: str) -> Run:
    """A run that gave the right text, with what the one who dials saw of its peer."""
    seen = dialler.sightings(peer_id)
    first_at = {what: next((s.at for s in seen if s.what == what), None) for what in ("contact", "direct")}
    connected = [sighting for sighting in seen if sighting.what in ("direct", "relayed")]
    if not connected:
        return Run(role, left, right, "failed", why="a text, and no connection was seen")
    # Whoever was dialled by the other side was never in contact by itself.
    contact_at = min(first_at["contact"] or connected[0].at, connected[0].at)
    how: Literal["direct", "relayed"] = "direct" if first_at["direct"] is not None else "relayed"
    last_at = next(sighting.at for sighting in connected if sighting.what == how)
    return Run(
        role,
        left,
        right,
        how,
        first_s=round(connected[0].at - contact_at, 3),
        direct_s=None if first_at["direct"] is None else round(first_at["direct"] - contact_at, 3),
        start_s=round(last_at - dialler.started_at, 3),
    )


def rounds(kinds: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """All pairs, in rounds in which every kind is once on the left and once on the right."""
    for shift in range(len(kinds)):
        yield [(kind, kinds[(index + shift) % len(kinds)]) for index, kind in enumerate(kinds)]


def generate(
    commands: Commands,
    host: str,
    tokens: int,
    routes: Sequence[WrittenRoute],
    flags: Sequence[str],
    prompt: str = PROMPT,
) -> Command:
    """Start a generation that goes the first of these routes, or the next one if a peer has failed."""
    return commands.generate(
        host,
        prompt,
        *flags,
        *("--max-new-tokens", str(tokens), "--policy", POLICY),
        *("--set", "client.find_timeout_s=30", "--set", "client.dtype=float32", "-v"),
        **{VARIABLE: write_routes(*routes)},
    )


def start_relays(commands: Commands, hosts: Sequence[str] = RELAYS, *options: str) -> list[str]:
    """Start introducers that relay, and return the flags by which others join them."""
    relays: list[Command] = []
    flags: list[str] = []
    for host in hosts:
        listen = f"/ip4/{commands.lab.scenario.public_ipv4(host)}/tcp/{RELAY_PORT}"
        relays.append(commands.node(host, "--no-blocks", "--listen", listen, *options, *flags))
        flags += bootstrap(relays[-1].event("ready")["addrs"][:1])
    return flags


def reachable(node: Command) -> str:
    """The id of a node that serves, once others can reach it in some way or other."""

    def look() -> bool | None:
        known = [event for event in node.events() if event["event"] == "reached"]
        reached = known and (known[-1]["reachability"] in ("public", "mapped") or known[-1]["relays"])
        return True if reached else None

    node.wait_until(look, "a way to be reached")
    peer_id: str = node.event("ready")["peer_id"]
    return peer_id


def leave(commands: Sequence[Command] | Any) -> None:
    """End commands as Ctrl-C does, all at once; kill who does not go."""
    running = [command for command in commands if command.exit_code is None]
    for command in running:
        command.signal(signal.SIGTERM)
    for command in running:
        try:
            command.wait(15.0)
        except TimeoutError:
            command.kill()


def measure(commands: Commands, runs: int, kinds: Sequence[str], before: Sequence[Run] = ()) -> Iterator[Run]:
    """Run every pair of these kinds in both roles until it has `runs` runs, those of `before` included."""
    bench = Bench(commands, kinds)
    had: Counter[tuple[Role, str, str]] = Counter((run.role, run.left, run.right) for run in before)
    for number in range(1, runs + 1):
        bench.is_wanted = partial(_lacks, had, number)
        for run in chain(bench.client_rounds(), bench.hop_rounds()):
            had[run.role, run.left, run.right] += 1
            yield run
        print(f"{number} of {runs}, {time.strftime('%H:%M:%S')}", file=sys.stderr)


def _lacks(had: Counter[tuple[Role, str, str]], number: int, role: Role, left: str, right: str) -> bool:
    return had[role, left, right] < number
