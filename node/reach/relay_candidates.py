"""Candidates for a place at a relay, best first."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable

from p2pinfer.node.host.host import Host
from p2pinfer.routing.announcement import Announcement

from .reachability import Observation, global_addrs, is_global, tcp_address
from .relay_reservations import RelayCandidate


def relay_candidates(
    host: Host, observations: Collection[Observation], announcements: Iterable[Announcement]
) -> list[RelayCandidate]:
    """Peers outside our router: those that have seen us and are connected, then those that announce it."""
    found = {
        each.peer_id: RelayCandidate(each.peer_id, (tcp_address(remote),))
        for each in observations
        if is_global(each.seen_ip) and each.local_port is not None
        if (remote := host.remote_address(each.peer_id)) is not None
    }
    observers = random.sample(list(found.values()), len(found))
    announced = [
        RelayCandidate(peer.peer_id, addrs)
        for peer in announcements
        if peer.reachability in ("public", "mapped") and peer.peer_id not in {host.peer_id, *found}
        if (addrs := global_addrs(peer.addrs))
    ]
    return observers + random.sample(announced, len(announced))
