"""Rendering of a node's events and of a generation's summary for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from p2pinfer.node import events

from .plain import one_line, printable, short_peer

if TYPE_CHECKING:
    from p2pinfer.audit.auditor import AuditTally
    from p2pinfer.generation.generation import GenerationResult
    from p2pinfer.reputation.view import ReputationView


_INDENT = "\n          "  # below the first line's words, behind the time


def route_table(result: GenerationResult, view: ReputationView, audits: AuditTally) -> RenderableType:
    """The bill of a generation: what each hop took, how far it is believed, and how fast the whole was."""
    timings = result.timings
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("hop")
    table.add_column("blocks")
    table.add_column("connection")
    table.add_column("ms/token", justify="right")
    table.add_column("integrity", justify="right")
    table.add_column("reliability", justify="right")
    for index, hop in enumerate(result.route):
        spent = f"{timings.per_hop_ms[index]:.2f}" if index < len(timings.per_hop_ms) else "-"
        score = view.score(hop.peer_id)
        scores = f"{score.integrity:.2f}", f"{score.reliability:.2f}"
        table.add_row(Text(short_peer(hop.peer_id)), str(hop.span), hop.connection, spent, *scores)
    elsewhere = timings.per_step_ms - sum(timings.per_hop_ms)
    if timings.per_hop_ms and elsewhere > 0:
        table.add_row("network", "", "", f"{elsewhere:.2f}", style="dim")
    predicted = timings.predicted_tokens_per_s
    expected = "" if predicted is None else f" (expected: {predicted:.1f})"
    summary = (
        f"{len(result.token_ids)} tokens generated from a prompt of {result.prompt_tokens}: "
        f"{timings.tokens_per_s:.1f} tok/s{expected}, first token after {timings.first_token_s * 1e3:.0f} ms"
    )
    if result.failovers:
        summary += f"; {result.failovers} failover{'s' * (result.failovers > 1)}"
    told = [summary, _describe_audits(audits)]
    if result.speculation is not None and result.speculation.drafted:
        stats = result.speculation
        trips = (
            f"{stats.tokens_per_trip:.2f} tokens per trip: {stats.accepted} of {stats.drafted} guesses right"
        )
        if stats.in_flight > 1:
            trips += f"; {stats.in_flight:.1f} windows in flight"
        told.insert(1, trips)
    return Group(table, *map(Text, told))


def _describe_audits(audits: AuditTally) -> str:
    return _count_audits(audits.done, audits.passed, audits.failed, audits.suspect)


def _count_audits(done: int, passed: int, failed: int, suspect: int) -> str:
    if not done:
        return "no hop was audited"
    counts = {
        "passed": passed,
        "failed": failed,
        "suspect": suspect,
        "inconclusive": done - passed - failed - suspect,
    }
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{done} hop{'s' * (done > 1)} audited: {told}"


def describe_event(event: events.Event) -> str:
    """A node's event for its operator."""
    match event:
        case events.Starting():
            return f"this node is {event.peer_id}"
        case events.Loading(blocks=(start, stop)):
            return f"loading blocks {start}:{stop} ({event.reason})"
        case events.Ready():
            return _INDENT.join([*_offer(event), *(f"--bootstrap {addr}" for addr in event.addrs)])
        case events.Joined():
            return _INDENT.join(_joined(event))
        case events.Stopped():
            return _totals(event)
        case events.Reached():
            return event.description
        case events.SessionOpened():
            return (
                f"{short_peer(event.peer_id)} opened a session for up to {event.max_tokens:,} tokens; "
                f"{event.sessions} open"
            )
        case events.SessionClosed():
            return (
                f"session of {short_peer(event.peer_id)} closed after {event.tokens:,} tokens "
                f"({one_line(event.reason)}); {event.sessions} open"
            )
        case events.SessionRefused():
            return f"refused a session of {short_peer(event.peer_id)}: {one_line(event.message)}"
        case events.Verified():
            counts = _count_audits(event.audits, event.passed, event.failed, event.suspect)
            return f"audited other peers: {counts}"
        case events.NodeLeaving():
            return "left the swarm"


def _offer(ready: events.Ready) -> list[str]:
    """Lines on what a node offers; the addresses by which it is joined follow."""
    relaying = "relaying is off (--relay-rate)"
    if ready.relay_bytes_per_s:
        rate = _bytes(ready.relay_bytes_per_s)
        relaying = f"relays up to {rate}/s for peers behind routers, if publicly reachable (--relay-rate)"
    if ready.blocks is None:
        return ["introducing peers to each other, without blocks", relaying, "others join with"]
    start, stop = ready.blocks
    return [
        f"serving blocks {start}:{stop} of {ready.model}: {ready.dtype} on {ready.device}, "
        f"{ready.tokens_per_s:,.0f} tok/s",
        f"memory: {_bytes(ready.weights_bytes)} for weights, up to {_bytes(ready.cache_bytes)} "
        f"for a KV cache of {ready.cache_tokens:,} tokens",
        relaying,
        "others join with",
    ]


def _joined(event: events.Joined) -> list[str]:
    lines = [f"connected to {event.peers} peer{'s' * (event.peers != 1)}"]
    asked = len(event.answered) + len(event.silent)
    if asked:
        lines[0] += f"; {len(event.answered)} of {asked} bootstrap peer{'s' * (asked > 1)} answered"
    elif not event.peers:
        lines[0] += (
            ": no bootstrap peer is given, and none was found on the local network; others can join this node"
        )
    lines += [f"answered: {printable(address)}" for address in event.answered]
    return lines + [
        f"did not answer: {printable(address)} ({one_line(why, 160)})" for address, why in event.silent
    ]


def _totals(event: events.Stopped) -> str:
    audits = f"audited {event.audits_of_us:,} time{'s' * (event.audits_of_us != 1)}"
    return (
        f"stopped after {_duration(event.uptime_s)}: "
        f"{event.sessions:,} session{'s' * (event.sessions != 1)}, "
        f"{event.refusals:,} refused, {event.tokens:,} tokens computed, {_bytes(event.bytes_sent)} sent, "
        f"{_bytes(event.bytes_received)} received, {_bytes(event.bytes_relayed)} relayed for others, {audits}"
    )


def _bytes(count: float) -> str:
    """`1.5 MB`: powers of a thousand, as of lines and discs."""
    power = 0
    while count >= 1000 and power < 4:
        count, power = count / 1000, power + 1
    number = f"{count:.1f}" if power and count < 100 else f"{count:.0f}"
    return f"{number} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {seconds % 60:.0f} s"
