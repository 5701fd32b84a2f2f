"""Addresses that a peer announces while it is being dialled at others."""

from __future__ import annotations

from p2pinfer.node.host.host import Host

from .live_table import LiveTable


async def keep_dials_fresh(host: Host, view: LiveTable) -> None:
    """Give dials under way what their peers announce meanwhile; until cancelled.

    A node whose line has got another public address announces that within seconds, and a dial of its former
    address would go on in silence to its limit.
    """
    while True:
        changed = view.changed
        for peer in view.everybody() if host.dials else ():
            if peer.peer_id in host.dials:
                host.dials[peer.peer_id].add(peer.addrs)
        await changed.wait()
