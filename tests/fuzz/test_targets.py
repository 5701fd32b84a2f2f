"""The targets of the coverage-guided run, under what hypothesis comes up with."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.node.transport.identity import is_peer_id

from .rewrite import rewrite
from .targets import PEER_ID, Target, targets

TARGETS = targets()
# Nobody can sign for that peer, so nothing is ever taken for its record.
UNFORGEABLE = ("record", "signature")


def test_the_peer_that_is_impersonated_might_exist() -> None:
    assert is_peer_id(PEER_ID)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_what_belongs_there_is_taken(target: Target) -> None:
    if target.name == "chain":  # its second seed is an equivocation
        assert [target.run(seed) for seed in target.seeds] == [True, False]
    else:
        assert {target.run(seed) for seed in target.seeds} == {target.name not in UNFORGEABLE}


@given(st.sampled_from(TARGETS), st.binary(max_size=300))
def test_garbage_is_a_clear_error(target: Target, garbage: bytes) -> None:
    target.run(garbage)


@given(st.sampled_from(TARGETS), st.integers(0, 2**32), st.integers(1, 6))
def test_what_was_rewritten_is_a_clear_error_or_means_something(
    target: Target, seed: int, times: int
) -> None:
    rng = random.Random(seed)
    message = rng.choice(target.seeds)
    for _ in range(times):
        message = rewrite(message, rng)
    target.run(message)


def test_rewriting_keeps_the_form_often_enough_to_get_behind_it() -> None:
    """Of one value changed, a decoder still takes a good share: what lies behind it is reached."""
    rng = random.Random(5)
    for target in TARGETS:
        if target.name in UNFORGEABLE:
            continue
        changed = [rewrite(target.seeds[0], rng) for _ in range(400)]
        taken = sum(target.run(each) for each in changed if each != target.seeds[0])
        assert taken >= 8, f"{target.name}: {taken} of {len(changed)}"
