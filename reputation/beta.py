"""Quantiles of the Beta distribution, which models pass-or-fail evidence about a peer.

The regularised incomplete beta function by its continued fraction (DLMF 8.17.22, evaluated as Lentz does:
Numerical Recipes, 3rd ed., 5.2 and 6.4), and its inverse by bisection. A dependency for one function of one
variable would weigh a hundred times what this does.
"""

from __future__ import annotations

import math
from functools import lru_cache

_TINY = 1e-300
_MAX_TERMS = 300  # converges in about sqrt(max(a, b)) terms
_STEPS = 40  # of bisection: to 1e-12


@lru_cache(maxsize=65_536)
def quantile(share: float, alpha: float, beta: float) -> float:
    """The value below which a Beta(alpha, beta) variable lies with probability `share`.

    Args:
        share: Above 0 and below 1.
        alpha, beta: Pseudo-counts of good and bad, both 1 or more.
    """
    assert 0 < share < 1 and alpha >= 1 and beta >= 1, (share, alpha, beta)
    if beta == 1:  # the distribution function is x ** alpha
        return float(share ** (1 / alpha))
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if cumulative(middle, alpha, beta) < share:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def cumulative(value: float, alpha: float, beta: float) -> float:
    """The probability that a Beta(alpha, beta) variable is at most `value`."""
    if value <= 0:
        return 0.0
    if value >= 1:
        return 1.0
    log_front = (
        math.lgamma(alpha + beta)
        - math.lgamma(alpha)
        - math.lgamma(beta)
        + alpha * math.log(value)
        + beta * math.log1p(-value)
    )
    # The fraction converges fast on the near side of the mean; the other side is its mirror image.
    if value < (alpha + 1) / (alpha + beta + 2):
        return math.exp(log_front) * _fraction(value, alpha, beta) / alpha
    return 1.0 - math.exp(log_front) * _fraction(1 - value, beta, alpha) / beta


def _fraction(value: float, alpha: float, beta: float) -> float:
    front, denominator = 1.0, 1 / _kept_off_zero(1 - (alpha + beta) * value / (alpha + 1))
    total = denominator
    for term in range(1, _MAX_TERMS):
        doubled = 2 * term
        for numerator in (
            term * (beta - term) * value / ((alpha + doubled - 1) * (alpha + doubled)),
            -(alpha + term) * (alpha + beta + term) * value / ((alpha + doubled) * (alpha + doubled + 1)),
        ):
            denominator = 1 / _kept_off_zero(1 + numerator * denominator)
            front = _kept_off_zero(1 + numerator / front)
            factor = denominator * front
            total *= factor
        if abs(factor - 1) < 1e-13:
            break
    return total


def _kept_off_zero(number: float) -> float:
    return number if abs(number) > _TINY else _TINY
