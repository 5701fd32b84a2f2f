"""`python -m tests.chaos.matrix`: every fault, at every moment, to every hop; how long the text pauses.

    faults     kill -9, SIGSTOP; blackhole, link flap, NAT table flush, relay death in a simulated internet
    moments    at prefill, between steps, inside a step
    victims    the first, the middle, the last hop, two neighbours, and a hop together with its replacement

A route has three hops, and 512 tokens of history when one fails in the middle of a text. The ids must be
those that transformers gives, greedy and drawn in turn. Writes the table of docs/reliability.md; exit code 1
if an id was wrong or a pause longer than promised.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Final

from ..lab.namespaces import why_not
from ..lab.table import put_between
from .processes import ROOT
from .requests import expected_ids, history
from .stages import SPANS, Internet, Loopback, Stage, open_internet, open_loopback
from .watched import NEW_TOKENS

DOCUMENT: Final = ROOT / "docs" / "reliability.md"
BEGIN: Final = "<!-- make matrix writes from here -->"
END: Final = "<!-- to here -->"

FAULTS: Final = (*Loopback.faults, *Internet.faults)
MOMENTS: Final = ("at prefill", "between steps", "inside a step")
VICTIMS: Final[Mapping[str, tuple[str, ...]]] = {
    "first hop": ("first",),
    "middle hop": ("middle",),
    "last hop": ("last",),
    "two hops": ("middle", "last"),
    "a hop and its replacement": ("middle", "spare1"),
}
PROMISED_S: Final = {"kill -9": 1.5, "SIGSTOP": 5.0, "blackhole": 5.0}  # in the median, to one or two hops
SEED: Final = 7
PATIENCE_S: Final = 90.0  # for a generation
ATTEMPTS: Final = 4  # to get the route that was laid down: who was harmed before may not be back yet


@dataclass(frozen=True)
class Case:
    """One thing that happens."""

    fault: str
    moment: str
    victims: str
    seed: int | None = None


@dataclass(frozen=True)
class Run:
    """What came of it. `stall_s` is the longest pause of the text after the harm."""

    case: Case
    stall_s: float
    failovers: int
    why: str = ""  # what went wrong


def cases(faults: Sequence[str], rounds: int) -> Iterator[Case]:
    """All of them, greedy and drawn in turn."""
    for number in range(rounds):
        every = product(faults, VICTIMS, MOMENTS)
        for index, (fault, victims, moment) in enumerate(every):
            yield Case(fault, moment, victims, None if (index + number) % 2 else SEED)


class Bench:
    """Runs cases on one stage, with one client process that is another peer in each."""

    def __init__(self, stage: Stage, stack: ExitStack) -> None:
        self._stage = stage
        self._client = stage.watched()
        stack.callback(self._end)
        self._unread = b""

    def run(self, case: Case) -> Run:
        """One case, with everything as it was afterwards."""
        for _ in range(ATTEMPTS):
            run = self._attempt(case)
            if run is not None:
                return run
            time.sleep(5.0)
        return Run(case, 0.0, 0, "the route was not to be had")

    def _attempt(self, case: Case) -> Run | None:
        """None if the session did not begin on the route that was laid down."""
        victims = VICTIMS[case.victims]
        peers = self._stage.peers(case.fault, victims)
        hops = [place for place in victims if place in SPANS]
        order = {
            "route": [(peers[place], span) for place, span in SPANS.items()],
            "spares": [peer for place, peer in peers.items() if place not in SPANS],
            "moment": case.moment,
            "seed": case.seed,
            "anywhere": self._stage.anywhere,
        }
        self._write(json.dumps(order))
        harmed_at, last_at, stall_s, again = None, None, 0.0, "spare1" in victims
        try:
            while True:
                event = self._read()
                match event["event"]:
                    case "now":
                        self._stage.harm(case.fault, hops)
                        harmed_at = time.monotonic()
                        self._write("go on")
                    case "spare":
                        if again and harmed_at is not None and peers["spare1"] in event["peers"]:
                            self._stage.harm(case.fault, ["spare1"])
                            again = False
                        self._write("go on")
                    case "token":
                        # Tokens of a step that had passed the hop come at once; the pause is behind them.
                        if harmed_at is not None:
                            stall_s = max(stall_s, event["at"] - (last_at or harmed_at))
                            last_at = event["at"]
                    case _:
                        return self._judge(case, peers, event, stall_s)
        finally:
            self._stage.mend()

    def _judge(
        self, case: Case, peers: Mapping[str, str], ended: Mapping[str, Any], stall_s: float
    ) -> Run | None:
        if ended["went"] != [peers[place] for place in SPANS]:
            return None
        why = ended.get("error", "")
        if not stall_s:
            why = why or "it was over before"
        elif ended["ids"] != expected(case.seed):
            why = why or f"wrong ids {ended['ids']}"
        return Run(case, stall_s, ended["failovers"], why)

    def _write(self, line: str) -> None:
        assert self._client.stdin is not None
        print(line, file=self._client.stdin, flush=True)

    def _read(self) -> dict[str, Any]:
        assert self._client.stdout is not None
        pipe = self._client.stdout.fileno()
        while b"\n" not in self._unread:
            ready, _, _ = select.select([pipe], [], [], PATIENCE_S)
            if not ready:
                raise TimeoutError(f"the client says nothing for {PATIENCE_S:g} s")
            received = os.read(pipe, 1 << 16)
            if not received:
                raise OSError("the client has ended")
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    def _end(self) -> None:
        with self._client:
            self._client.kill()


@cache
def expected(seed: int | None) -> list[int]:
    """What transformers says."""
    (ids,) = expected_ids([history(seed, new_tokens=NEW_TOKENS)])
    return ids


def run_matrix(
    faults: Sequence[str],
    rounds: int,
    say: Callable[[str], None] = print,
    chosen: Sequence[Case] | None = None,
    at_once: int = 1,
) -> list[Run]:
    """Every case of these faults, or those that are chosen; `at_once` stages side by side."""
    todo = [case for case in chosen or cases(faults, rounds) if case.fault in faults]
    with ThreadPoolExecutor(at_once) as pool:
        batches = pool.map(partial(_run_batch, say=say), _batches(todo))
        return [run for batch in batches for run in batch]


def _run_batch(batch: Sequence[Case], say: Callable[[str], None]) -> list[Run]:
    """Cases on a stage of their own."""
    done: list[Run] = []
    with ExitStack() as stack:
        if batch[0].fault in Loopback.faults:
            home = stack.enter_context(tempfile.TemporaryDirectory(prefix="p2pinfer-matrix-"))
            bench = Bench(stack.enter_context(open_loopback(Path(home))), stack)
        else:
            bench = Bench(stack.enter_context(open_internet()), stack)
        for case in batch:
            done.append(bench.run(case))
            say(describe(done[-1]))
    return done


def _batches(todo: Sequence[Case]) -> Iterator[list[Case]]:
    """The cases that share a stage. Peers shun relays that died often, so those cases have one each."""
    for faults in (Loopback.faults, *([fault] for fault in Internet.faults[:-1])):
        if batch := [case for case in todo if case.fault in faults]:
            yield batch
    yield from ([case] for case in todo if case.fault == Internet.faults[-1])


def describe(run: Run) -> str:
    """On one line."""
    case = run.case
    return (
        f"{case.fault:16} {case.moment:14} {case.victims:26} {run.stall_s:6.2f} s "
        f"{run.failovers} failovers {'drawn' if case.seed else 'greedy':6} {run.why}"
    )


def shortcomings(runs: Sequence[Run]) -> list[str]:
    """What is not as promised."""
    short = [describe(run) for run in runs if run.why]
    for fault, promised_s in PROMISED_S.items():
        moments = MOMENTS if fault == "kill -9" else ("inside a step",)
        stalls = [run.stall_s for run in runs if run.case.fault == fault and run.case.moment in moments]
        if stalls and median(stalls) > promised_s:
            short.append(f"{fault}: {median(stalls):.2f} s in the median, promised {promised_s:g} s")
    return short


def render(runs: Sequence[Run]) -> str:
    """The table: the longest pause after the harm in seconds, median and longest."""
    lines = [
        f"| | | {' | '.join(MOMENTS)} |",
        f"| --- | --- |{' ---: |' * len(MOMENTS)}",
    ]
    for fault in dict.fromkeys(run.case.fault for run in runs):
        for victims in VICTIMS:
            cells = [_cell(runs, fault, victims, moment) for moment in MOMENTS]
            lines.append(f"| {fault} | {victims} | {' | '.join(cells)} |")
    right = sum(not run.why for run in runs)
    lines += ["", f"{len(runs)} generations, {right} of them with the ids that transformers gives."]
    return "\n".join(lines)


def _cell(runs: Sequence[Run], fault: str, victims: str, moment: str) -> str:
    these = [
        run for run in runs if (run.case.fault, run.case.victims, run.case.moment) == (fault, victims, moment)
    ]
    stalls = sorted(run.stall_s for run in these if not run.why)
    failed = f"; {len(these) - len(stalls)} failed" if len(stalls) < len(these) else ""
    if not stalls:
        return failed[2:] or "not run"
    if len(stalls) == 1:
        return f"{stalls[0]:.2f}{failed}"
    return f"{median(stalls):.2f} ({stalls[-1]:.2f}){failed}"


def write(document: Path, runs: Sequence[Run]) -> None:
    """Put the table into a document, between the two marks.

    Raises:
        ValueError: The document lacks the marks.
    """
    put_between(document, BEGIN, END, f"\n{render(runs)}\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.matrix")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=1, help="so many stages side by side")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="only this one; nothing is written")
    asked = parser.parse_args()
    faults = asked.fault or FAULTS
    if set(faults) & set(Internet.faults) and (obstacle := why_not()):
        print(obstacle, file=sys.stderr)
        return 1
    runs = run_matrix(faults, asked.rounds, lambda line: print(line, flush=True), at_once=asked.at_once)
    print(render(runs))
    if not asked.fault:
        write(DOCUMENT, runs)
    short = shortcomings(runs)
    print("\n".join(short), file=sys.stderr)
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
