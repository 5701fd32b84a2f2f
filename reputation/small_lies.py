"""Sequential test of a peer's honesty over all its audits, for lies that are too small for one of them.

Three figures of an audited session are watched: the share of tokens that deviate further than honest peers'
nearly ever do (`HIGH_RHO`), the share of those whose likeliest successor lost its lead (`LOST_LEAD`), and how
far the typical token lies beyond that of any honest peer (`typical_excess`). Each becomes a number x from 0
to 1, whose mean is at most `HONEST_MEAN` for an honest peer, whatever software it runs. The tokens of one
session depend on each other and may all have deviated together; of different sessions nothing is assumed but
that bound, so no independence is needed:

    wealth <- (wealth + stake_n) * (1 + BET * (x - HONEST_MEAN)),  stake_n = 1 / (n (n + 1))

Each factor has a mean of at most 1, so does the wealth of a bet that begins with `stake_n` at the n-th
session, and the stakes come to 1. So the wealth of an honest peer exceeds 1 / `FALSE_BANS` with a probability
of at most `FALSE_BANS`, over all sessions it will ever take part in (Ville's inequality; betting on bounded
means as in Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2023). Bets
that begin later are what finds a peer that lies after a long honest time.

Short sessions are put together until there are enough tokens; else a peer that gives short answers only
would never be measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from p2pinfer.models.verify.deviation import Deviation

from .verdict import independent_tokens, typical_excess

HONEST_MEAN: Final = 0.05  # of x
BET: Final = 10.0  # of the wealth, on x above that; below 1 / HONEST_MEAN
FALSE_BANS: Final = 1e-6  # probability that an honest peer is ever found guilty
POOL_TOKENS: Final = 24.0  # tokens that make one x
_HIGH: Final = (0.1, 0.3)  # shares of high tokens at which x is 0 and 1
_LOST: Final = (0.0, 0.1)  # the same of lost leads
_BEYOND: Final = (0.0, 1.0)  # the same of typical tokens
_MOST: Final = 1e12  # wealth is not counted beyond this

_Amount = Annotated[float, msgspec.Meta(ge=0, le=_MOST)]


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens of one audited session, those that round alike counted as one.

    Attributes:
        tokens: How many there were.
        high: How many of them deviate further than `HIGH_RHO`.
        with_logits: Of how many the logits were looked at.
        lost: How many of those lost a lead of more than `LOST_LEAD`.
        beyond: Each token counts as much as the typical one of its chunk lies beyond honest ones, 0..1.
    """

    tokens: float = 0.0
    high: float = 0.0
    with_logits: float = 0.0
    lost: float = 0.0
    beyond: float = 0.0


class Bets(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """State of the test of one figure.

    Attributes:
        tokens, counted: Of short sessions, kept until there are `POOL_TOKENS`.
        rounds: Bets so far.
        wealth: What they came to.
    """

    tokens: _Amount = 0.0
    counted: _Amount = 0.0
    rounds: Annotated[int, msgspec.Meta(ge=0, le=1 << 48)] = 0
    wealth: _Amount = 0.0


class SmallLies(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """State of the test of one peer: a bet on each of the three figures."""

    high: Bets = Bets()
    lost: Bets = Bets()
    typical: Bets = Bets()

    @property
    def wealth(self) -> float:
        """The mean of the bets' wealth, for which the bound holds as it does for each."""
        return (self.high.wealth + self.lost.wealth + self.typical.wealth) / 3

    @property
    def is_guilty(self) -> bool:
        """True if an honest peer would come to this with a probability of `FALSE_BANS` at most."""
        return self.wealth * FALSE_BANS >= 1

    @property
    def suspicion(self) -> float:
        """Way to being guilty, 0..1, for the rate of audits; 0 for nearly every honest peer."""
        return min(1.0, math.log(max(self.wealth, 1.0)) / -math.log(FALSE_BANS))

    def after(self, sample: Sample) -> SmallLies:
        """The state after one more session."""
        return SmallLies(
            _after(self.high, sample.tokens, sample.high, _HIGH),
            _after(self.lost, sample.with_logits, sample.lost, _LOST),
            _after(self.typical, sample.tokens, sample.beyond, _BEYOND),
        )

    def are_clean_since(self, before: SmallLies) -> bool:
        """True if short sessions together came to a bet after `before`, and no bet was won."""
        bets = ((self.high, before.high), (self.lost, before.lost), (self.typical, before.typical))
        return self.high.rounds > before.high.rounds and all(not _is_won(*each) for each in bets)


def sample_of(deviation: Deviation) -> Sample:
    """Sample of a measured session. Chunks in which experts leave a doubt are left out."""
    tokens = high = with_logits = lost = beyond = 0.0
    for chunk in deviation.chunks:
        if not chunk.tokens or chunk.undecided or chunk.clouded:
            continue
        each = independent_tokens(chunk) / chunk.tokens
        tokens += each * chunk.tokens
        high += each * chunk.high
        beyond += each * chunk.tokens * typical_excess(chunk)
        if chunk.logits is not None:
            with_logits += each * chunk.tokens
            lost += each * chunk.logits.lost_leads
    return Sample(tokens, high, with_logits, lost, beyond)


def _is_won(now: Bets, before: Bets) -> bool:
    """True if x was above `HONEST_MEAN` in the bet that lies between the two."""
    return now.rounds > before.rounds and now.wealth > before.wealth + _stake(now.rounds)


def _stake(rounds: int) -> float:
    return 1 / (rounds * (rounds + 1))


def _after(bets: Bets, tokens: float, counted: float, range_: tuple[float, float]) -> Bets:
    tokens, counted = bets.tokens + tokens, bets.counted + counted
    if tokens < POOL_TOKENS:
        return Bets(tokens, counted, bets.rounds, bets.wealth)
    none, all_ = range_
    x = min(1.0, max(0.0, (counted / tokens - none) / (all_ - none)))
    rounds = bets.rounds + 1
    wealth = (bets.wealth + _stake(rounds)) * (1 + BET * (x - HONEST_MEAN))
    return Bets(0.0, 0.0, rounds, min(wealth, _MOST))
