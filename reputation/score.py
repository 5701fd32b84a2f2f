"""How far a peer is to be believed, as two numbers that mean different things."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Score:
    """What a peer's past says about its next session.

    Attributes:
        integrity: How sure we are that it computes what it was asked to, 0..1.
        reliability: How probably it stays until the session is done, 0..1.
    """

    integrity: float
    reliability: float
