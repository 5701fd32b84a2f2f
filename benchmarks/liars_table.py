"""Every attack on audits that is known, each a run of liars.py, side by side: one table.

    python benchmarks/liars_table.py --processes 12 --limit-s 480 --out liars
    python benchmarks/liars_table.py --rows skip+gap next --generations 40

Each row is a run of its own: six nodes, of which one or two lie, and each has an honest twin for the same
blocks. Where a lie is not found at once the twin is a slower computer, so that the liar is used. A row in
which no liar was ever chosen says nothing about audits: it is run again, three times at most, and what is
left of such rows is told at the end. A run takes the time of one and a half processors, and its
figures do not depend on what runs beside it. What comes is written to `--out` at once: ROW.json for each row,
ROW.log for its errors and progress. The table of all rows follows at the end. With `--limit-s` each row stops
beginning texts in time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio
from contest import report
from side_by_side import Done, Job, python, run_all

TRIES: Final = 3  # of a row whose liar is not chosen: which one of twins is, is a matter of chance
OVERHEAD_S: Final = 75.0  # of a run beside its texts: nodes that start, audits, proofs, bystanders
ROWS: Final[Mapping[str, tuple[str, ...]]] = {
    # Lies that take long to find come first, or they would be the last to end.
    "next": ("--cheat", "-", "-", "next", "-", "-", "slow"),
    "kv-int8": ("--cheat", "-", "kv-int8", "-", "-", "slow"),
    "skip in a fifth": ("--cheat", "-", "skip:0.2:0:1", "-", "-", "slow"),
    "skip in a fifth, late": ("--cheat", "-", "skip:0.2:20:2", "-", "-", "slow"),
    "skip in a tenth": ("--cheat", "-", "skip:0.1:0:3", "-", "-", "slow"),
    "skip after 20 sessions": ("--cheat", "-", "skip:1:20", "-", "-", "slow"),
    "skip+gap": ("--cheat", "-", "skip+gap"),
    "skip+withhold": ("--cheat", "-", "skip+withhold"),
    "skip+lastbreak": ("--cheat", "-", "skip+lastbreak"),
    "skip+midbreak": ("--cheat", "-", "skip+midbreak"),
    "skip+late": ("--cheat", "-", "skip+late"),
    "skip+trickle": ("--cheat", "-", "skip+trickle"),
    "skip+wary": ("--cheat", "-", "skip+wary"),
    "half-int8": ("--cheat", "-", "half-int8", "-", "-", "slow"),
    "skip, 4 tokens": ("--cheat", "-", "skip", "--new-tokens", "4"),
    "redraw in a fifth": ("--cheat", "-", "-", "slow", "-", "-", "redraw:0.2", "--thin"),
    "nobody, thin": ("--cheat", "--thin"),
    "int8 and skip": ("--cheat", "int8", "skip"),
    "tamper": ("--cheat", "-", "tamper"),
    "skip, flood": ("--cheat", "-", "skip", "--flood", "20"),
    "nobody, flood": ("--cheat", "--flood", "20"),
    "nobody": ("--cheat",),
}


async def run_rows(rows: Mapping[str, tuple[str, ...]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of each row that came to an end, in the order of `rows`."""
    waves = -(-len(rows) // options.processes)
    seconds = max(10.0, options.limit_s / waves - OVERHEAD_S)
    script = Path(__file__).with_name("liars.py")
    common = ("--generations", str(options.generations), "--seconds", str(seconds))
    jobs = [Job(name, python(script, *words, *common)) for name, words in rows.items()]
    found: dict[str, dict[str, Any]] = {}

    def take_in(done: Done) -> None:
        if not done.said:
            return
        (row,) = json.loads(done.said)["rows"]
        found[done.name] = {"row": done.name, **row}
        path = options.out / f"{done.name.replace(' ', '_').replace(',', '')}.json"
        path.write_text(json.dumps(found[done.name], indent=1), encoding="utf-8")
        told = (
            "generations",
            "chosen",
            "found after",
            "by liars, last half",
            "honest banned",
            "extra",
            "extra, last half",
        )
        print(f"{done.name}: " + ", ".join(f"{each} {row[each]}" for each in told), file=sys.stderr)

    began_at, left_s = trio.current_time(), options.limit_s
    for _ in range(TRIES):
        await run_all(jobs, options.processes, take_in, logs=options.out, limit_s=left_s)
        jobs = [job for job in jobs if says_nothing(found.get(job.name))]
        left_s = options.limit_s - (trio.current_time() - began_at)
        if not jobs or left_s < seconds + OVERHEAD_S:
            break
    for job in jobs:
        print(f"{job.name}: no liar was ever chosen, so it says nothing about audits", file=sys.stderr)
    return [found[name] for name in rows if name in found]


def says_nothing(row: Mapping[str, Any] | None) -> bool:
    """True for a row with liars that were never chosen."""
    return row is not None and bool(row["cheats"]) and not row["chosen"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--processes", type=int, default=4, help="runs at once")
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--limit-s", type=float, default=7200.0, help="of everything")
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir(), "liars"), help="folder for what comes"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = trio.run(partial(run_rows, {name: ROWS[name] for name in options.rows}, options))
    if not rows:
        raise SystemExit(f"no row came to an end; see {options.out}")
    report(f"one of two nodes for a span lies, {options.generations} generations", rows)


if __name__ == "__main__":
    main()
