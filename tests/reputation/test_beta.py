import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.reputation.beta import cumulative, quantile

counts = st.floats(1, 2000)


@pytest.mark.parametrize(
    ("share", "alpha", "beta", "value"),
    [  # from the polynomials that whole parameters give
        (0.05, 1, 1, 0.05),
        (0.05, 9, 1, 0.05 ** (1 / 9)),
        (0.25, 1, 2, 1 - math.sqrt(0.75)),
        (0.5, 7, 7, 0.5),
    ],
)
def test_quantiles_that_are_known(share: float, alpha: float, beta: float, value: float) -> None:
    assert quantile(share, alpha, beta) == pytest.approx(value, abs=1e-9)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.001, 0.999))
def test_the_distribution_of_whole_counts_is_a_binomial_tail(alpha: int, beta: int, value: float) -> None:
    """DLMF 8.17.5."""
    tosses = alpha + beta - 1
    tail = sum(
        math.comb(tosses, k) * value**k * (1 - value) ** (tosses - k) for k in range(alpha, tosses + 1)
    )
    assert cumulative(value, alpha, beta) == pytest.approx(tail, abs=1e-9)


@given(st.floats(0.001, 0.999), counts, counts)
def test_a_quantile_undoes_the_distribution(share: float, alpha: float, beta: float) -> None:
    assert cumulative(quantile(share, alpha, beta), alpha, beta) == pytest.approx(share, abs=1e-6)


@given(counts, counts)
def test_good_raises_a_quantile_and_bad_lowers_it(alpha: float, beta: float) -> None:
    assert quantile(0.05, alpha, beta + 1) <= quantile(0.05, alpha, beta) + 1e-9
    assert quantile(0.05, alpha, beta) <= quantile(0.05, alpha + 1, beta) + 1e-9


def test_the_distribution_is_flat_beyond_its_ends() -> None:
    assert (cumulative(-1.0, 2, 3), cumulative(0.0, 2, 3), cumulative(1.0, 2, 3)) == (0.0, 0.0, 1.0)
