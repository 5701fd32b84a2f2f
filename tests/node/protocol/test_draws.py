"""Token ids, terms of draws, and draws, as hostile peers may write them."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import ConfigError, ProtocolViolation
from p2pinfer.models.text.sampling_config import LogitsRules, SamplingConfig
from p2pinfer.node.protocol.draws import (
    Draw,
    Draws,
    Log,
    decode_draws,
    decode_ids,
    draw_of,
    encode_draws,
    encode_ids,
)

VOCAB = 100
DRAWS = Draws((3, 99), (Log(-0.5, ((3, -0.5), (7, -1.0))), Log(-2.0)))


def test_what_was_drawn_arrives() -> None:
    assert decode_draws(encode_draws(DRAWS), 2, VOCAB) == DRAWS
    assert decode_draws(b"", 0, VOCAB) == Draws(())
    assert list(decode_ids(encode_ids((0, 99, 5)), 3, VOCAB)) == [0, 99, 5]


@pytest.mark.parametrize(
    ("draws", "tokens"),
    [
        pytest.param(Draws((3,)), 2, id="fewer than positions"),
        pytest.param(Draws((3, 4)), 1, id="more than positions"),
        pytest.param(Draws(()), 1, id="none"),
        pytest.param(Draws((VOCAB,)), 1, id="a token that the model has not"),
        pytest.param(Draws((3,), (Log(-1.0, ((VOCAB, -1.0),)),)), 1, id="a likeliest one that it has not"),
        pytest.param(Draws((3, 4), (Log(-1.0),)), 2, id="log probabilities of one of two"),
        pytest.param(Draws((3,)), 0, id="of a position that nothing came back for"),
    ],
)
def test_draws_that_do_not_fit_their_step_are_a_violation(draws: Draws, tokens: int) -> None:
    with pytest.raises(ProtocolViolation):
        decode_draws(encode_draws(draws), tokens, VOCAB)


@pytest.mark.parametrize(
    ("logs", "asked"),
    [
        pytest.param((), 0, id="none, where each token's own was asked for"),
        pytest.param((Log(-1.0, ((3, -1.0),)),), 2, id="of one likely token of two"),
        pytest.param((Log(-1.0, ((3, -1.0), (4, -2.0))),), 1, id="of two of one"),
        pytest.param((Log(float("nan")),), 0, id="no number"),
        pytest.param((Log(-1.0, ((3, 0.5),)),), 1, id="of more than certainty"),
    ],
)
def test_log_probabilities_are_those_that_were_asked_for(logs: tuple[Log, ...], asked: int) -> None:
    """Whoever asked for them counts on them: the error would come far from the hop that left them out."""
    with pytest.raises(ProtocolViolation):
        decode_draws(encode_draws(Draws((3,), logs)), 1, VOCAB, logprobs=asked)
    right = (Log(-1.0, tuple((token, -1.0) for token in range(asked))),)
    assert decode_draws(encode_draws(Draws((3,), right)), 1, VOCAB, logprobs=asked).logs == right
    assert decode_draws(b"", 0, VOCAB, logprobs=asked) == Draws(())


def test_no_draws_said_at_length_are_no_draws() -> None:
    assert decode_draws(encode_draws(Draws(())), 0, VOCAB) == Draws(())


@given(
    st.binary(max_size=64)
    | st.recursive(st.integers(-1, 200) | st.floats(), st.lists).map(msgspec.msgpack.encode),
    st.integers(0, 3),
)
def test_of_any_bytes_draws_are_right_or_a_violation(payload: bytes, tokens: int) -> None:
    try:
        draws = decode_draws(payload, tokens, VOCAB)
    except ProtocolViolation:
        return
    assert len(draws.ids) == tokens and all(token_id < VOCAB for token_id in draws.ids)


@given(st.binary(max_size=20), st.integers(0, 4))
def test_of_any_bytes_ids_are_right_or_a_violation(payload: bytes, tokens: int) -> None:
    try:
        ids = decode_ids(payload, tokens, VOCAB)
    except ProtocolViolation:
        return
    assert len(ids) == tokens and all(token_id < VOCAB for token_id in ids)


@given(st.binary(max_size=64))
def test_of_any_bytes_the_rules_of_draws_are_rules_or_refused(rules: bytes) -> None:
    terms = draw_of(SamplingConfig(seed=1), LogitsRules(), prompt_tokens=1, max_ids=9, eos_ids=())
    hostile: Draw = msgspec.structs.replace(terms, rules=rules)
    try:
        assert isinstance(hostile.logits_rules(), LogitsRules)
    except ConfigError:
        return
