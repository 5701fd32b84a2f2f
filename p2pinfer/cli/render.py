"""How a node's events and a generation's bill look to people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from p2pinfer.node import events

from .plain import one_line, short_peer

if TYPE_CHECKING:
    from p2pinfer.audit import AuditTally
    from p2pinfer.generate import GenerationResult
    from p2pinfer.reputation.view import ReputationView


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
    summary = (
        f"{len(result.token_ids)} tokens after a prompt of {result.prompt_tokens}: "
        f"{timings.tokens_per_s:.1f} tok/s, the first after {timings.first_token_s * 1e3:.0f} ms"
    )
    if result.failovers:
        summary += f"; {result.failovers} failover{'s' * (result.failovers > 1)}"
    return Group(table, Text(summary), Text(_describe_audits(audits)))


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
            return "\n          ".join([_offer(event), *(f"--bootstrap {addr}" for addr in event.addrs)])
        case events.Reached():
            return event.description
        case events.SessionOpened():
            return (
                f"{short_peer(event.peer_id)} opened a session of {event.max_tokens:,} tokens; "
                f"{event.sessions} open"
            )
        case events.SessionClosed():
            return (
                f"{short_peer(event.peer_id)} had {event.tokens:,} tokens computed "
                f"({one_line(event.reason)}); {event.sessions} open"
            )
        case events.SessionRefused():
            return f"{short_peer(event.peer_id)} was refused a session: {one_line(event.message)}"
        case events.Verified():
            return f"checked others: {_count_audits(event.audits, event.passed, event.failed, event.suspect)}"
        case events.Leaving():
            return "said goodbye to the swarm"


def _offer(ready: events.Ready) -> str:
    """What a node offers; the addresses by which it is joined follow."""
    if ready.blocks is None:
        return "introducing peers to each other; they join with"
    start, stop = ready.blocks
    return (
        f"serving blocks {start}:{stop} of {ready.model}: {ready.dtype} on {ready.device}, "
        f"{ready.tokens_per_s:,.0f} tok/s, cache for {ready.cache_tokens:,} tokens; others join with"
    )
