"""Members of a swarm with real hosts."""

from __future__ import annotations

from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.host import Host
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.transport.identity import Identity, new_identity
from p2pinfer.routing.announcement import Announcement

REVISION, OTHER = "a" * 32, "b" * 32


def announce(view: LiveTable, revision: str = REVISION, host: Host | None = None) -> Identity:
    """Have somebody announce to `view`: `host`'s addresses, or nobody in particular."""
    identity = new_identity()
    announcement = Announcement(
        identity.peer_id,
        "model",
        revision,
        BlockSpan(0, 4),
        "float32",
        10.0,
        1000,
        1,
        addrs=host.addrs if host else (),
    )
    view.publish(identity, announcement)
    return identity


def peers(view: LiveTable) -> set[str]:
    return {announcement.peer_id for announcement in view.everybody()}
