"""`python -m tests.lab`: look around in the lab, and make its table.

python -m tests.lab list
python -m tests.lab shell SCENARIO HOST     every process of yours in there ends with the shell
python -m tests.lab run SCENARIO HOST COMMAND...
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from . import moves as address_changes
from . import thin_lines
from .commands import open_commands
from .lab import Lab, lacks, open_lab
from .namespaces import ROOT, environ, why_not
from .pairs import Run, measure
from .scenario import Scenario
from .scenarios import KINDS, SCENARIOS, named
from .table import DOCUMENT, keep, load, put_between, shortcomings, write


def main() -> int:
    """Run one of the commands; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description="The internet in a box.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the scenarios")
    shell = commands.add_parser("shell", help="a shell in a host or router of a scenario")
    run = commands.add_parser("run", help="a command in a host or router of a scenario")
    for each in (shell, run):
        each.add_argument("scenario")
        each.add_argument("host")
    run.add_argument("argv", nargs=argparse.REMAINDER)
    pairs = commands.add_parser("pairs", help="every pair of kinds, and the tables of docs/nat.md")
    pairs.add_argument("--runs", type=int, default=5)
    pairs.add_argument("--add", action="store_true", help="what is missing to the runs that were kept")
    pairs.add_argument("--kinds", default="", help="only these, separated by commas; nothing is written")
    lines = commands.add_parser("lines", help="prompts over thin lines, and the table of docs/reliability.md")
    lines.add_argument("cells", nargs="*", help="MBIT,MS,PERCENT,TOKENS; nothing is written")
    lines.add_argument("--add", action="store_true", help="what is missing to the cells that were kept")
    lines.add_argument("--most", type=int, help="so many cells at most")
    lines.add_argument("--at-once", type=int, default=thin_lines.AT_ONCE)
    moves = commands.add_parser("moves", help="homes that get other addresses, and the table of docs/nat.md")
    moves.add_argument("--kinds", default="", help="only these, separated by commas; nothing is written")
    moves.add_argument("--add", action="store_true", help="what is missing to the moves that were kept")
    moves.add_argument("--rounds", type=int, help="so many rounds at most, of four moves at once")
    asked = parser.parse_args()
    if asked.command == "list":
        print("\n".join(f"{name:12} {scenario.says}" for name, scenario in SCENARIOS.items()))
        return 0
    try:
        scenario = named(asked.scenario if asked.command in ("shell", "run") else "all-pairs")
        if asked.command in ("shell", "run"):
            scenario.site(asked.host)
    except KeyError as exc:
        print(exc.args[0], file=sys.stderr)
        return 2
    if obstacle := why_not() or lacks(scenario):
        print(obstacle, file=sys.stderr)
        return 1
    if asked.command == "pairs":
        before = load() if asked.add else []
        return measure_pairs(scenario, asked.runs, tuple(filter(None, asked.kinds.split(","))), before)
    if asked.command == "lines":
        kept_lines = thin_lines.load() if asked.add else []
        return measure_thin_lines(asked.cells, kept_lines, asked.most, asked.at_once)
    if asked.command == "moves":
        kept = address_changes.load() if asked.add else []
        kinds = tuple(kind for kind in str(asked.kinds).split(",") if kind)
        return measure_address_changes(scenario, kinds, kept, asked.rounds)
    argv = [os.environ.get("SHELL", "/bin/sh")] if asked.command == "shell" else asked.argv
    with open_lab(scenario) as lab:
        if asked.command == "shell":
            print(introduction(scenario, lab, asked.host))
        return subprocess.call(
            lab.corner.enter(argv, netns=asked.host),
            env=environ(PYTHONPATH=str(ROOT), LAB_KEEPER=str(lab.corner.keeper)),
        )


def measure_pairs(scenario: Scenario, runs: int, kinds: tuple[str, ...], before: list[Run]) -> int:
    """Run the pairs, say what is missing, and write the tables if all kinds took part; the exit code."""
    done = list(before)
    with open_lab(scenario) as lab, open_commands(lab) as opened:
        for run in measure(opened, runs, kinds or tuple(KINDS), before):
            times = f"{run.first_s} {run.direct_s}"
            print(f"{run.role:7} {run.left:16} {run.right:16} {run.how:8} {times} {run.why}", flush=True)
            done.append(run)
            if not kinds:
                keep(done)
    if kinds:
        return 0
    write(DOCUMENT, done)
    short = shortcomings(done)
    print("\n".join(short), file=sys.stderr)
    return 1 if short else 0


def measure_thin_lines(
    cells: list[str], before: list[thin_lines.Prefill], most: int | None, at_once: int
) -> int:
    """Send prompts over thin lines, and write the table unless cells were chosen; the exit code."""
    chosen: list[thin_lines.Cell] = []
    for cell in cells:
        mbit, ms, loss, tokens = cell.split(",")
        chosen.append((float(mbit), float(ms), float(loss), int(tokens)))
    had = {run.cell for run in before}
    lacking = [cell for cell in thin_lines.CELLS if cell not in had][:most]
    done = list(before)
    for run in thin_lines.measure_lines(chosen or lacking, at_once):
        print(thin_lines.describe(run), flush=True)
        done.append(run)
        if not chosen:
            thin_lines.keep(done)
    if chosen:
        return 1 if any(run.why for run in done) else 0
    table = thin_lines.render(done)
    put_between(thin_lines.DOCUMENT, thin_lines.BEGIN, thin_lines.END, f"\n{table}\n")
    short = thin_lines.shortcomings(done)
    print("\n".join(short), file=sys.stderr)
    return 1 if short else 0


def measure_address_changes(
    scenario: Scenario, kinds: tuple[str, ...], before: list[address_changes.Move], most: int | None
) -> int:
    """Change addresses in the middle of texts; write the table unless kinds were chosen. The exit code."""
    done = list(before)
    with open_lab(scenario) as lab, open_commands(lab) as opened:
        moves = address_changes.measure_moves(opened, kinds or address_changes.KINDS, before, most)
        for move in moves:
            print(address_changes.describe(move), flush=True)
            done.append(move)
            if not kinds:
                address_changes.keep(done)
    if kinds:
        return 0 if all(move.is_right for move in done) else 1
    put_between(DOCUMENT, address_changes.BEGIN, address_changes.END, address_changes.render(done))
    short = address_changes.shortcomings(done)
    print("\n".join(short), file=sys.stderr)
    return 1 if short else 0


def introduction(scenario: Scenario, lab: Lab, here: str) -> str:
    """Who is where, for somebody who has just come in."""
    lines = [f"{scenario.name}: {scenario.says}", ""]
    for site in scenario.sites:
        for host in site.hosts:
            behind = " < ".join(site.routers) or "public"
            seen = f"seen as {scenario.public_ipv4(host)}" if site.ipv4 and site.routers else ""
            own = scenario.own_ipv4(host) if site.ipv4 else scenario.public_ipv6(host)
            lines.append(f"  {'>' if host == here else ' '} {host:10} {own:16} {behind:34} {seen}")
    another = " ".join(lab.corner.enter(["sh"], netns="HOST"))
    lines += ["", "A shell in another host of the same internet, from another terminal:", f"  {another}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
