"""Prompts over thin, long and lossy home lines: when the first token comes, and if the text is right.

Two nodes and a client, each behind a router that keeps ports, on three lines of the same kind. The lines are
those of the lab: packets wait, are dropped and travel in one process, since the kernel's own shaper is not
everywhere. A cell says what lies between two homes, so each line has half of the delay and half of the loss.

What the line and the distance allow is known beforehand (`Prefill.bound_s`): the prompt's hidden states once
over one line, at its rate or at what TCP makes of its losses, and the round trips that opening takes.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from tests.chaos.requests import tokenizer
from tests.e2e.support import prompt_of

from .commands import Commands, open_commands
from .lab import open_lab
from .namespaces import ROOT
from .pairs import leave, reachable, start_relays
from .pinned import POLICY, VARIABLE, write_routes
from .reference import greedy_ids, lengthened
from .scenario import Line, Scenario, Site
from .scenarios import KINDS, RELAYS, relay_sites

DOCUMENT: Final = ROOT / "docs" / "reliability.md"
BEGIN: Final = "<!-- make lab-lines writes from here -->"
END: Final = "<!-- lines to here -->"
TOKENS: Final = 4  # of text
BYTES_A_TOKEN: Final = 1280  # of the bundled model's hidden states in float32
CONTEXT: Final = 2048  # the bundled model is given room for the longest prompt and the text
SPANS: Final = ("0:4", "4:8")
SETTLE_S: Final = 3.0
# What relays carry by default is for home lines. Those here are in data centres, and nobody measures them.
LENT_SERVER: Final = ("--set", "relay.bytes_per_s=20e6", "--set", "relay.bytes_per_s_per_peer=5e6")
QUEUE_MS: Final = 300.0  # of a router, at full rate

PATIENCE_S: Final = 300.0  # with a generation
AT_ONCE: Final = 4  # labs, which mostly wait
MEASURED: Final = Path(__file__).with_name("thin_lines.json")

PROMISED: Final = 1.5  # times what the line and the distance allow
SEGMENT_BYTES: Final = 1448  # of TCP
# In order: a connection through a relay (of which two are to the relay), a session at a hop, the link between
# two hops, and the way of the prompt and of the first token: three times one way.
ROUND_TRIPS: Final = 5 + 2 + 2 + 1.5

Cell = tuple[float, float, float, int]
CELLS: Final[tuple[Cell, ...]] = (
    # Mbit/s up, ms one way, % lost, tokens of the prompt
    *((rate, 50, 0, tokens) for rate in (0.25, 1, 8) for tokens in (10, 300, 1000, 2000)),
    *((rate, 400, 0, tokens) for rate in (0.25, 1, 8) for tokens in (10, 300)),
    *((rate, 800, 0, tokens) for rate in (0.25, 1, 8) for tokens in (10, 300)),
    (8, 400, 0, 1000),
    (8, 400, 0, 2000),
    (8, 800, 0, 1000),
    (8, 800, 0, 2000),
    *((rate, 50, loss, 300) for rate in (0.25, 1, 8) for loss in (1, 5)),
    (1, 50, 1, 1000),
    (8, 50, 1, 1000),
    (8, 50, 5, 1000),
    (8, 50, 5, 2000),
    *((1, delay, loss, 10) for delay in (400, 800) for loss in (1, 5)),
    (8, 400, 1, 300),
    (8, 800, 1, 100),
    (8, 800, 5, 100),
)


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt over one kind of line. `first_s` is from the start of the generation to its first token."""

    mbit: float
    delay_ms: float
    loss_percent: float
    tokens: int
    first_s: float
    failovers: int
    why: str = ""

    @property
    def cell(self) -> Cell:
        """The kind of line, and the prompt."""
        return self.mbit, self.delay_ms, self.loss_percent, self.tokens

    @property
    def bytes_per_s(self) -> float:
        """Rate of one line, or of TCP on it if losses allow less.

        A connection that loses a share p of its segments carries at most MSS / (RTT sqrt(2p/3)): Mathis,
        Semke, Mahdavi and Ott, "The Macroscopic Behavior of the TCP Congestion Avoidance Algorithm", 1997.
        """
        line = self.mbit * 125_000
        if not self.loss_percent:
            return line
        rtt_s = 2 * self.delay_ms / 1000
        return min(line, SEGMENT_BYTES / (rtt_s * math.sqrt(2 * self.loss_percent / 100 / 3)))

    @property
    def line_s(self) -> float:
        """Seconds that the prompt takes on one line at that rate."""
        return self.tokens * BYTES_A_TOKEN / self.bytes_per_s

    @property
    def bound_s(self) -> float:
        """Seconds to the first token that line and distance allow."""
        return self.line_s + ROUND_TRIPS * 2 * self.delay_ms / 1000

    @property
    def ratio(self) -> float:
        """Times as long as that."""
        return self.first_s / self.bound_s


def measure_lines(cells: Iterable[Cell] = CELLS, at_once: int = AT_ONCE) -> Iterator[Prefill]:
    """One prompt in every cell, each with a lab and nodes of its own."""
    cells = list(cells)
    with tempfile.TemporaryDirectory(prefix="p2pinfer-lines-") as home, ThreadPoolExecutor(at_once) as pool:
        model = lengthened(Path(home) / "tiny-stories", CONTEXT)
        for tokens in {cell[3] for cell in cells}:  # here: transformers does not load a model in two threads
            greedy_ids(prompt_of(tokenizer(), tokens), TOKENS, model)
        for done in as_completed([pool.submit(_measure, cell, model) for cell in cells]):
            yield done.result()


def _measure(cell: Cell, model: Path) -> Prefill:
    mbit, delay_ms, loss_percent, tokens = cell
    line = Line(delay_ms / 2, 2, up_mbit=mbit, down_mbit=16, queue_ms=QUEUE_MS, loss=loss_percent / 100 / 2)
    homes = (Site(host, (host,), KINDS["port-preserving"], line) for host in ("n1", "n2", "me"))
    scenario = Scenario("thin", "three homes on lines of one kind", (*relay_sites(), *homes))
    with open_lab(scenario) as lab, open_commands(lab) as commands:
        first_s, failovers, why = _prefill(commands, tokens, model)
    return Prefill(mbit, delay_ms, loss_percent, tokens, round(first_s, 2), failovers, why)


def load(path: Path = MEASURED) -> list[Prefill]:
    """The runs as they were kept."""
    if not path.exists():
        return []
    return [Prefill(**run) for run in json.loads(path.read_text(encoding="utf-8"))]


def keep(runs: Sequence[Prefill], path: Path = MEASURED) -> None:
    """Keep the runs, one a line, so that a change shows as one."""
    lines = ",\n".join(json.dumps(asdict(run)) for run in runs)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def shortcomings(runs: Sequence[Prefill], cells: Sequence[Cell] = CELLS) -> list[str]:
    """What of the requirements these runs do not show, a line each."""
    measured = {run.cell for run in runs}
    missing = [f"{cell} not run" for cell in cells if cell not in measured]
    return missing + [describe(run) for run in runs if run.why or run.ratio > PROMISED]


def _prefill(commands: Commands, tokens: int, model: Path) -> tuple[float, int, str]:
    """(seconds to the first token, failovers, what went wrong)"""
    prompt = prompt_of(tokenizer(), tokens)
    relays = start_relays(commands, RELAYS, *LENT_SERVER)
    nodes = [
        commands.node(host, "--model", str(model), "--blocks", span, *relays)
        for host, span in zip(("n1", "n2"), SPANS, strict=True)
    ]
    try:
        route = [(reachable(node), span) for node, span in zip(nodes, SPANS, strict=True)]
        time.sleep(SETTLE_S)
        client = commands.generate(
            "me",
            prompt,
            *relays,
            *("--model", str(model)),
            *("--max-new-tokens", str(TOKENS), "--policy", POLICY, "--audit-rate", "0"),
            *("--set", "client.find_timeout_s=30", "--set", "client.dtype=float32"),
            **{VARIABLE: write_routes(route)},
        )
        if client.wait(PATIENCE_S) != 0:
            return 0.0, 0, (client.err.strip().splitlines() or ["it failed"])[-1]
    except TimeoutError as exc:
        return 0.0, 0, str(exc).splitlines()[0]
    finally:
        leave(nodes)
    result = json.loads(client.out)
    right = tuple(result["token_ids"]) == greedy_ids(prompt, TOKENS, model)
    return result["timings"]["first_token_s"], result["failovers"], "" if right else "wrong text"


def describe(run: Prefill) -> str:
    """One line."""
    line = f"{run.mbit:g} Mbit/s, {run.delay_ms:g} ms, {run.loss_percent:g} % lost, {run.tokens} tokens"
    came = f"{run.bound_s:.1f} s at best, first token {run.first_s:.1f} s ({run.ratio:.2f} times)"
    return f"{line}: {came}, {run.failovers} failovers {run.why}"


def render(runs: Sequence[Prefill]) -> str:
    """The table for docs/reliability.md."""
    rows = [
        "| up, Mbit/s | one way, ms | lost, % | tokens | line, s | best, s | first, s | times | failovers |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in sorted(runs, key=lambda run: (run.loss_percent, run.delay_ms, run.mbit, run.tokens)):
        came = run.why or f"{run.first_s:.1f}"
        rows.append(
            f"| {run.mbit:g} | {run.delay_ms:g} | {run.loss_percent:g} | {run.tokens} | {run.line_s:.1f} | "
            f"{run.bound_s:.1f} | {came} | {run.ratio:.2f} | {run.failovers} |"
        )
    return "\n".join(rows)
