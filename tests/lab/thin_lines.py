"""Prompts over thin, long and lossy home lines: when the first token comes, and if the text is right.

Two nodes and a client, each behind a router that keeps ports, on three lines of the same kind. The lines are
those of the lab: packets wait, are dropped and travel in one process, since the kernel's own shaper is not
everywhere. A cell's line time is that of the prompt's hidden states on one line at its full rate.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tests.chaos.requests import tokenizer
from tests.e2e.support import prompt_of

from .commands import Commands, open_commands
from .lab import open_lab
from .namespaces import ROOT
from .pairs import leave, reachable, start_relays
from .pinned import POLICY, VARIABLE, write_routes
from .reference import greedy_ids
from .scenario import Line, Scenario, Site
from .scenarios import KINDS, relay_sites

DOCUMENT: Final = ROOT / "docs" / "reliability.md"
BEGIN: Final = "<!-- make lab-lines writes from here -->"
END: Final = "<!-- lines to here -->"
TOKENS: Final = 4  # of text
BYTES_A_TOKEN: Final = 1280  # of the bundled model's hidden states in float32
SPANS: Final = ("0:4", "4:8")
SETTLE_S: Final = 3.0
QUEUE_MS: Final = 300.0  # of a router, at full rate

CELLS: Final = (
    # Mbit/s up, ms one way, % lost, tokens of the prompt
    (0.25, 50, 0, 10),
    (0.25, 50, 0, 100),
    (0.25, 50, 0, 1000),
    (1, 50, 0, 1000),
    (1, 50, 0, 2000),
    (8, 50, 0, 1000),
    (1, 50, 1, 300),
    (1, 50, 5, 100),
    (1, 400, 0, 300),
    (1, 800, 0, 100),
    (8, 800, 0, 1000),
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
    def line_s(self) -> float:
        """Seconds that the prompt takes on one line at its full rate."""
        return self.tokens * BYTES_A_TOKEN * 8 / (self.mbit * 1e6)


def measure_lines(cells: Iterable[tuple[float, float, float, int]] = CELLS) -> Iterator[Prefill]:
    """One prompt in every cell, each with nodes of its own."""
    for mbit, delay_ms, loss_percent, tokens in cells:
        line = Line(delay_ms, 2, up_mbit=mbit, down_mbit=16, queue_ms=QUEUE_MS, loss=loss_percent / 100)
        homes = (Site(host, (host,), KINDS["port-preserving"], line) for host in ("n1", "n2", "me"))
        scenario = Scenario("thin", "three homes on lines of one kind", (*relay_sites(), *homes))
        with open_lab(scenario) as lab, open_commands(lab) as commands:
            first_s, failovers, why = _prefill(commands, tokens)
        yield Prefill(mbit, delay_ms, loss_percent, tokens, first_s, failovers, why)


def _prefill(commands: Commands, tokens: int) -> tuple[float, int, str]:
    """(seconds to the first token, failovers, what went wrong)"""
    prompt = prompt_of(tokenizer(), tokens)
    relays = start_relays(commands)
    nodes = [
        commands.node(host, "--blocks", span, *relays) for host, span in zip(("n1", "n2"), SPANS, strict=True)
    ]
    try:
        route = [(reachable(node), span) for node, span in zip(nodes, SPANS, strict=True)]
        time.sleep(SETTLE_S)
        client = commands.generate(
            "me",
            prompt,
            *relays,
            *("--max-new-tokens", str(TOKENS), "--policy", POLICY, "--audit-rate", "0"),
            *("--set", "client.find_timeout_s=30", "--set", "client.dtype=float32"),
            **{VARIABLE: write_routes(route)},
        )
        if client.wait(300.0) != 0:
            return 0.0, 0, (client.err.strip().splitlines() or ["it failed"])[-1]
    except TimeoutError as exc:
        return 0.0, 0, str(exc).splitlines()[0]
    finally:
        leave(nodes)
    result = json.loads(client.out)
    right = tuple(result["token_ids"]) == greedy_ids(prompt, TOKENS)
    return result["timings"]["first_token_s"], result["failovers"], "" if right else "wrong text"


def describe(run: Prefill) -> str:
    """One line."""
    line = f"{run.mbit:g} Mbit/s, {run.delay_ms:g} ms, {run.loss_percent:g} % lost, {run.tokens} tokens"
    came = f"{run.line_s:.1f} s of line, first token {run.first_s:.1f} s, {run.failovers} failovers"
    return f"{line}: {came} {run.why}"


def render(runs: Sequence[Prefill]) -> str:
    """The table for docs/reliability.md."""
    rows = [
        "| up, Mbit/s | one way, ms | lost, % | prompt, tokens | line time, s | first token, s | failovers |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in runs:
        came = run.why or f"{run.first_s:.1f}"
        rows.append(
            f"| {run.mbit:g} | {run.delay_ms:g} | {run.loss_percent:g} | {run.tokens} | {run.line_s:.1f} | "
            f"{came} | {run.failovers} |"
        )
    return "\n".join(rows)
