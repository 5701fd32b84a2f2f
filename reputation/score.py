"""How far a peer is to be believed, as two numbers that mean different things."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Score:
    """What a peer's past says about its next session.

    Attributes:
        integrity: What we are 95 % sure of that it computes as it was asked to, 0..1: the 5 % quantile of
            what audits say, so a newcomer scores low until it has been checked.
        reliability: How probably it stays until the session is done, 0..1.
        is_newcomer: Too few audits to tell, and none of them failed.
        at_best: What both may turn out to be with every doubt in the peer's favour; None where no doubt is
            known. Exploring goes by it.
        is_stranger: It has passed no audit yet.
    """

    integrity: float
    reliability: float
    is_newcomer: bool = False
    at_best: Score | None = None
    is_stranger: bool = False
