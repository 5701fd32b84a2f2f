"""Reports of a node to its operator: the peers it joined, and a summary when it stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.compute.runner import SpanRunner
from p2pinfer.node.reach.reachability import describe
from p2pinfer.node.reach.relay_config import RelayConfig
from p2pinfer.node.swarm.membership import SwarmMember

from .events import Event, Joined, Reached, Ready, Stopped

JOIN_S: Final = 5.0  # how long bootstrap peers have before it is said who did not answer
CHECK_S: Final = 0.25
NEWS_S: Final = 60.0  # between two words on who has answered since


async def tell_joined(member: SwarmMember, report: Callable[[Event], None]) -> None:
    """Say whom this node joined once that is known, and again when others have answered; until cancelled."""
    with trio.move_on_after(JOIN_S):
        await member.wait_settled(JOIN_S)  # peers of earlier runs and of the local network among them
        while any(each.answered is None for each in member.bootstrap_outcomes()):
            await trio.sleep(CHECK_S)
    told = joined(member)
    report(told)
    while True:
        await trio.sleep(NEWS_S)
        now = joined(member)
        if set(now.answered) - set(told.answered) or (now.peers > 0) != (told.peers > 0):
            report(now)
            told = now


def joined(member: SwarmMember) -> Joined:
    """Event with the peers this node is connected to, and the bootstrap peers that answered."""
    outcomes = member.bootstrap_outcomes()
    return Joined(
        len(member.host.connected_peers()),
        tuple(each.address for each in outcomes if each.answered),
        tuple((each.address, each.why or "no answer yet") for each in outcomes if not each.answered),
    )


def stopped(member: SwarmMember, since: float) -> Stopped:
    """Event with the work of this node since that time of trio's clock."""
    counts, use = member.host.counts, member.reach.status.carried
    audits = counts.by_label("audits")
    return Stopped(
        uptime_s=trio.current_time() - since,
        sessions=counts.total("sessions_opened"),
        tokens=counts.total("tokens"),
        refusals=counts.total("refusals"),
        bytes_sent=sum(each.sent for each in counts.traffic.values()),
        bytes_received=sum(each.received for each in counts.traffic.values()),
        bytes_relayed=use.bytes_carried if use else 0,
        audits_of_us=audits.get("asked", 0),
    )


def reached(member: SwarmMember) -> Reached:
    """The event that says how others reach this node."""
    status = member.reach.status
    said = describe(status.reachability)
    if status.relays:
        said += f"; {len(status.relays)} relay{'s' * (len(status.relays) > 1)} carry connections to it"
    return Reached(status.reachability.kind, status.reachability.nat, member.addrs, status.relays, said)


def ready(
    member: SwarmMember, spec: ModelSpec, runner: SpanRunner, tokens_per_s: float, relay: RelayConfig
) -> Ready:
    """The event that says what this node serves."""
    return Ready(
        member.peer_id,
        member.addrs,
        spec.model,
        spec.revision,
        (runner.span.start, runner.span.stop),
        str(runner.numerics),
        runner.where,
        tokens_per_s,
        runner.cache.capacity_tokens,
        runner.cache.budget_bytes,
        len(runner.span) * spec.block_bytes(runner.numerics),
        relay.granted_bytes_per_s,
    )
