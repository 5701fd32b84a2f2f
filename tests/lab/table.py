"""The tables of docs/nat.md, written from the runs that `make lab` made."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from .namespaces import ROOT
from .pairs import Role, Run
from .scenarios import KINDS

MEASURED: Final = Path(__file__).with_name("measured.json")
DOCUMENT: Final = ROOT / "docs" / "nat.md"
BEGIN: Final = "<!-- make lab writes from here -->"
END: Final = "<!-- to here -->"
DIRECT_WITHIN_S: Final = 5.0  # of the first contact, in the median
RELAYED_WITHIN_S: Final = 3.0

TITLES: Final[dict[Role, tuple[str, str]]] = {
    "client": ("Node and client", "node"),
    "hops": ("Neighbouring hops", "predecessor"),
}
COLUMNS: Final[dict[Role, str]] = {"client": "client", "hops": "successor"}


def load(path: Path = MEASURED) -> list[Run]:
    """The runs as they were kept."""
    return [Run(**run) for run in json.loads(path.read_text(encoding="utf-8"))]


def keep(runs: Sequence[Run], path: Path = MEASURED) -> None:
    """Keep the runs, one a line, so that a change shows as one."""
    lines = ",\n".join(json.dumps(asdict(run)) for run in runs)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def must_be_direct(role: Role, left: str, right: str) -> bool:
    """Whether the two routers allow a direct connection, whoever has to make it.

    A client maps no ports, so behind a UPnP router it is like one behind a port-preserving router.
    """
    keep_ports = {"port-preserving", "double NAT", "UPnP"}
    reachable = {"public", "UPnP"}
    return (
        left in reachable
        or right == "public"
        or (right in reachable and role == "hops")
        or {left, right} <= keep_ports
    )


def shortcomings(runs: Sequence[Run], least: int = 5) -> list[str]:
    """What of the requirements these runs do not show, a line each."""
    short: list[str] = []
    for role, left, right in every_pair():
        these = select(runs, role, left, right)
        where = f"{left} and {right} as {role}"
        if len(these) < least:
            short.append(f"{where}: {len(these)} runs of {least}")
        for run in these:
            if run.how == "failed":
                short.append(f"{where}: {run.why.splitlines()[0] if run.why else 'failed'}")
        kinds = {run.how for run in these} - {"failed"}
        if must_be_direct(role, left, right) and "relayed" in kinds:
            relayed = sum(run.how == "relayed" for run in these)
            short.append(f"{where}: {relayed} of {len(these)} stayed relayed")
    return short + _too_slow(runs)


def _too_slow(runs: Sequence[Run]) -> list[str]:
    direct = [run.direct_s for run in runs if run.direct_s is not None]
    relayed = [run.first_s for run in runs if run.how == "relayed" and run.first_s is not None]
    short: list[str] = []
    for how, times, limit_s in (
        ("direct", direct, DIRECT_WITHIN_S),
        ("relayed", relayed, RELAYED_WITHIN_S),
    ):
        if times and statistics.median(times) > limit_s:
            short.append(f"{how} after {statistics.median(times):.1f} s in the median, not {limit_s:g}")
    return short


def render(runs: Sequence[Run]) -> str:
    """Both tables, and a line about each."""
    parts: list[str] = []
    for role, (title, row) in TITLES.items():
        parts += [f"### {title}", "", f"| {row} \\ {COLUMNS[role]} | " + " | ".join(KINDS) + " |"]
        parts.append("| --- " * (len(KINDS) + 1) + "|")
        for left in KINDS:
            cells = [_cell(select(runs, role, left, right)) for right in KINDS]
            parts.append(f"| {left} | " + " | ".join(cells) + " |")
        parts += ["", _summary([run for run in runs if run.role == role]), ""]
    return "\n".join(parts)


def _cell(runs: Sequence[Run]) -> str:
    """Most of a pair's runs in a few words: how, seconds after the first contact, seconds after the start."""
    if not runs:
        return "not run"
    hows = [run.how for run in runs]
    how = statistics.mode(hows)
    share = "" if hows.count(how) == len(runs) else f" ({hows.count(how)} of {len(runs)})"
    if how == "failed":
        return f"failed{share}"
    these = [run for run in runs if run.how == how]
    contact = _median(run.direct_s if how == "direct" else run.first_s for run in these)
    return f"{how}{share} {contact:.1f} / {_median(run.start_s for run in these):.1f}"


def _summary(runs: Sequence[Run]) -> str:
    direct = [run for run in runs if run.how == "direct"]
    relayed = [run for run in runs if run.how == "relayed"]
    sentences = [f"{len(runs)} runs: {len(direct)} direct, {len(relayed)} relayed"]
    if failed := len(runs) - len(direct) - len(relayed):
        sentences[0] += f", {failed} failed"
    for name, times in (
        ("direct", [run.direct_s for run in direct]),
        ("relayed", [run.first_s for run in relayed]),
    ):
        known = sorted(time for time in times if time is not None)
        if known:
            sentences.append(
                f"{name} after {statistics.median(known):.2f} s in the median, {known[-1]:.2f} at most"
            )
    return "; ".join(sentences) + "."


def _median(times: Iterable[float | None]) -> float:
    return statistics.median(time for time in times if time is not None)


def every_pair() -> list[tuple[Role, str, str]]:
    """All that the tables must have."""
    return [(role, left, right) for role in TITLES for left in KINDS for right in KINDS]


def select(runs: Iterable[Run], role: Role, left: str, right: str) -> list[Run]:
    """The runs of one pair."""
    return [run for run in runs if (run.role, run.left, run.right) == (role, left, right)]


def write(document: Path, runs: Sequence[Run]) -> None:
    """Put the tables into a document, between the two marks.

    Raises:
        ValueError: The document lacks the marks.
    """
    put_between(document, BEGIN, END, f"\n{render(runs)}")


def put_between(document: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two lines of a document.

    Raises:
        ValueError: The document lacks one of them.
    """
    before, has_begin, rest = document.read_text(encoding="utf-8").partition(begin)
    _, has_end, after = rest.partition(end)
    if not has_begin or not has_end:
        raise ValueError(f"{document} lacks {begin} or {end}")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
