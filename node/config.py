"""What a serving node may spend on others, and how long it waits for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Limits of a serving node. Each is reached by a test."""

    max_sessions: int = 256  # sessions open at once
    max_steps_in_flight: int = 64  # steps of one session received and not yet sent on
    max_chunk_tokens: int = 1024  # tokens in one step
    max_batch_tokens: int = 512  # prefill tokens computed in one batch; decode steps ride along
    replay_bytes: int = 1 << 30  # host memory for the replay logs of all sessions, bytes
    lease_s: float = 300.0  # a session idle this long is closed, seconds
    handshake_timeout_s: float = 10.0  # for a peer's first message, and for its predecessor's attachment
    dial_timeout_s: float = 10.0  # for reaching a session's successor
    announce_interval_s: float = 60.0  # between announcements when nothing changes
    announce_ttl_s: float = 120.0  # how long an announcement counts
    announce_min_gap_s: float = 5.0  # between announcements when much changes
    settle_s: float = 2.0  # how long a newcomer waits for the swarm's table before it picks a span
    leave_timeout_s: float = 3.0  # for the farewell on the way out
