"""Hidden states in 8 bits a value: what is lost, and what is not lost twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from p2pinfer.errors import ProtocolViolation, WrongOutput
from p2pinfer.models.numerics import CODECS, Codec, packed_row_bytes
from p2pinfer.models.packed_rows import nearest_unpacked, pack_rows, rounded_rows, steps_of, unpack_rows
from p2pinfer.node.protocol.tensors import (
    check_finite,
    dtype_of,
    encode_hidden,
    pack_hidden,
    round_hidden,
    unpack_hidden,
    view_packed,
)


def rows_of(tokens: int, hidden_size: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes, some values far above the others."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, hidden_size, generator=rng)
    rows *= torch.exp(3 * torch.randn(tokens, 1, generator=rng))
    rows[:, 0] *= 300
    return rows


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("hidden_size", [1, 31, 32, 100, 320])
def test_what_was_unpacked_packs_to_the_same_bytes_in_every_codec(codec: Codec, hidden_size: int) -> None:
    rows = rows_of(9, hidden_size).to(dtype_of(codec))
    rows[0], rows[1] = 0, rows[1] * 1e-6
    payload, packed = round_hidden(rows, codec)
    assert len(packed) == 9 * packed_row_bytes(hidden_size)
    assert pack_hidden(payload, 9, codec) == packed
    got, received = unpack_hidden(view_packed(bytearray(packed), 9, hidden_size), hidden_size, codec)
    assert bytes(received) == payload == encode_hidden(got, codec)


def test_a_value_moves_by_no_more_than_half_a_step_of_its_block() -> None:
    rows = rows_of(50, 320)
    rounded = rounded_rows(rows)
    largest = rows.view(50, -1, 32).abs().amax(-1).repeat_interleave(32, 1)
    assert ((rounded - rows).abs() <= steps_of(rows)).all()
    # All but the block's largest values, which may be cut at 127 steps.
    below = rows.abs() < 127 * steps_of(rows)
    assert ((rounded - rows).abs()[below] <= steps_of(rows)[below] / 2).all()
    assert (steps_of(rows) <= largest / 64).all()


@given(st.binary(min_size=2 * (64 + 2), max_size=2 * (64 + 2)), st.sampled_from(CODECS))
def test_whatever_bytes_come_are_rows_or_refused(content: bytes, codec: Codec) -> None:
    got, payload = unpack_hidden(view_packed(bytearray(content), 2, 64), 64, codec)
    assert got.shape == (2, 64)
    try:
        check_finite(payload, codec)
    except WrongOutput:
        return
    assert got.isfinite().all()


def test_packed_rows_of_another_size_are_refused() -> None:
    with pytest.raises(ProtocolViolation, match="65 bytes for 1 packed tokens of 64: 66 expected"):
        view_packed(bytearray(65), 1, 64)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_not_taken_in_when_it_was_packed(bad: float) -> None:
    rows = torch.ones(1, 64)
    rows[0, 40] = bad
    payload, _ = round_hidden(rows, "float32")
    with pytest.raises(WrongOutput):
        check_finite(payload, "float32")


def test_rows_are_no_further_from_the_exact_ones_than_their_packing_forces_them_to_be() -> None:
    exact = rows_of(40, 320)
    got = rounded_rows(exact)
    assert torch.equal(nearest_unpacked(exact, got), exact)
    moved = rounded_rows(exact + 3 * steps_of(exact))  # three integers further on
    nearest = nearest_unpacked(exact, moved)
    assert ((nearest - moved).abs() <= steps_of(moved)).all()
    apart = (nearest - exact) / steps_of(exact)
    assert apart.min() >= 0
    assert apart[:, 32:].median() > 2


def test_an_exponent_that_is_larger_than_need_be_explains_nothing() -> None:
    exact = torch.full((1, 32), 1.0)
    packed = pack_rows(exact)
    packed[:, 0] += 5  # steps of 1/2 instead of 1/64
    packed[:, 1:] = 2
    assert torch.equal(unpack_rows(packed, 32), exact)
    packed[:, 1:] = 3
    assert (nearest_unpacked(exact, unpack_rows(packed, 32)) - exact).min() > 0.4
