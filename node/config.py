"""What a serving node may spend on others, and how long it waits for them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from p2pinfer.routing.announcement import MAX_TTL_S, MIN_TTL_S


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Limits of a serving node. Each is reached by a test."""

    max_sessions: int = 256  # sessions open at once
    max_steps_in_flight: int = 16  # steps of one session received and not yet sent on
    max_chunk_tokens: int = 1024  # tokens in one step
    max_batch_tokens: int = 512  # prefill tokens computed in one batch; decode steps ride along
    replay_bytes: int = 1 << 30  # host memory for the replay logs of all sessions, bytes
    evidence_bytes: int = 256 << 20  # host memory for what receipts name, for whoever checks it, bytes
    evidence_keep_s: float = 900.0  # how long after a session's last step that is kept
    lease_s: float = 300.0  # a session idle this long is closed, seconds
    handshake_timeout_s: float = 10.0  # for a peer's first message, and for its predecessor's attachment
    dial_timeout_s: float = 10.0  # for reaching a session's successor
    announce_interval_s: float = 60.0  # between announcements when nothing changes
    announce_ttl_s: float = 120.0  # how long an announcement counts
    announce_min_gap_s: float = 5.0  # between announcements when much changes
    settle_s: float = 2.0  # how long a newcomer waits for the swarm's table before it picks a span
    leave_timeout_s: float = 3.0  # for the farewell on the way out

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value <= 0:
                raise ValueError(f"{each.name} is {value:g}; it must be above 0")
        if not MIN_TTL_S <= self.announce_ttl_s <= MAX_TTL_S:
            raise ValueError(
                f"announce_ttl_s is {self.announce_ttl_s:g}; peers accept {MIN_TTL_S:g} to {MAX_TTL_S:g}"
            )
        if self.announce_interval_s < self.announce_min_gap_s:
            raise ValueError(
                f"announce_interval_s is {self.announce_interval_s:g}, "
                f"which is less than announce_min_gap_s, {self.announce_min_gap_s:g}"
            )
