"""Network coordinates of peers, by which delays that nobody measured are estimated.

Vivaldi (Dabek et al., "Vivaldi: A Decentralized Network Coordinate System", SIGCOMM 2004, sections 2.5 and
5.4): every peer has a point in space and a height above it, its access link. The round trip of two peers
is the distance of their points plus both heights. After each measured round trip a peer moves a little
towards where the measurement would have been predicted.

What a peer says of itself may be a lie. It cannot make a measured round trip shorter, but it can claim any
position and any confidence, so claims are clamped, and one sample moves us `MAX_STEP_MS` at most.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

COORDINATE_LIMIT_MS = 10_000.0  # no axis and no height reaches further
MAX_ERROR = 1.0  # a peer that has measured nothing yet
_MIN_ERROR = 0.05  # nobody is believed to know its place better than this
_MIN_HEIGHT_MS = 0.05
_MAX_RTT_MS = 5_000.0
MAX_STEP_MS = 25.0
_GAIN = 0.25  # the paper's c_c = c_e = 0.25


class Coordinate(NamedTuple):
    """A point with a height, in milliseconds of round trip, and how wrong it tends to be (0..1)."""

    x_ms: float
    y_ms: float
    z_ms: float
    height_ms: float
    error: float


def starting_coordinate(peer_id: str) -> Coordinate:
    """First coordinate of a peer: within a millisecond of the origin, at a place of its own.

    Peers that all began at the origin would push each other along one line for ever; the paper draws a
    random direction, here the peer id is the source of randomness.
    """
    digest = hashlib.blake2b(peer_id.encode(), digest_size=6).digest()
    x_ms, y_ms, z_ms = (int.from_bytes(digest[i : i + 2]) / 0xFFFF - 0.5 for i in (0, 2, 4))
    return Coordinate(x_ms, y_ms, z_ms, 1.0, MAX_ERROR)


def distance_ms(a: Coordinate, b: Coordinate) -> float:
    """The predicted round trip between two peers."""
    return math.dist(a[:3], b[:3]) + (a.height_ms + b.height_ms)


def update(own: Coordinate, other: Coordinate, rtt_ms: float) -> Coordinate:
    """Move `own` after a round trip of `rtt_ms` to a peer that says it is at `other`.

    A round trip or a claim that is not a finite number moves nothing.
    """
    if not (math.isfinite(rtt_ms) and rtt_ms > 0 and all(map(math.isfinite, other))):
        return own
    rtt_ms = min(rtt_ms, _MAX_RTT_MS)
    other = clamp(other)
    predicted_ms = distance_ms(own, other)
    weight = own.error / (own.error + other.error)
    sample_error = min(abs(predicted_ms - rtt_ms) / rtt_ms, MAX_ERROR)
    error = own.error + _GAIN * weight * (sample_error - own.error)
    step_ms = _GAIN * weight * (rtt_ms - predicted_ms)
    step_ms = min(max(step_ms, -MAX_STEP_MS), MAX_STEP_MS)
    # Heights add where points subtract, so a push apart also lifts both: section 5.4.
    x_ms, y_ms, z_ms = (
        mine + step_ms * (mine - theirs) / predicted_ms
        for mine, theirs in zip(own[:3], other[:3], strict=True)
    )
    height_ms = own.height_ms + step_ms * (own.height_ms + other.height_ms) / predicted_ms
    return clamp(Coordinate(x_ms, y_ms, z_ms, height_ms, error))


def clamp(coordinate: Coordinate) -> Coordinate:
    """The nearest coordinate that is within the bounds every peer keeps to."""
    x_ms, y_ms, z_ms = (_between(-COORDINATE_LIMIT_MS, axis, COORDINATE_LIMIT_MS) for axis in coordinate[:3])
    height_ms = _between(_MIN_HEIGHT_MS, coordinate.height_ms, COORDINATE_LIMIT_MS)
    return Coordinate(x_ms, y_ms, z_ms, height_ms, _between(_MIN_ERROR, coordinate.error, MAX_ERROR))


def _between(low: float, value: float, high: float) -> float:
    return min(max(value, low), high)
