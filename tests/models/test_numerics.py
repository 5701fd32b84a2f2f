"""What peers hold and compute in, as text and in bytes."""

from __future__ import annotations

import re
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.models.numerics import (
    BFLOAT16,
    CODECS,
    FLOAT16,
    FLOAT32,
    QUANTISED,
    Codec,
    Numerics,
    are_comparable,
    common_codec,
    parse_numerics,
    plain,
    reference_for,
    row_bytes,
)

WEIGHTS = (*CODECS, *QUANTISED)
FIELD = re.compile(r"\A[a-z0-9_]{1,16}\Z")  # of announcements and receipts


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("compute", CODECS)
def test_every_pair_has_one_text_that_fits_the_fields_there_are(weights: str, compute: Codec) -> None:
    numerics = Numerics(weights, compute)
    assert FIELD.match(str(numerics))
    assert parse_numerics(str(numerics)) == numerics


def test_what_is_stored_as_it_is_computed_is_written_as_it_always_was() -> None:
    assert [str(each) for each in (FLOAT32, BFLOAT16, FLOAT16)] == ["float32", "bfloat16", "float16"]
    assert str(Numerics("int8", "bfloat16")) == "int8_bfloat16"
    assert str(Numerics("bfloat16", "float32")) == "bfloat16_float32"
    assert plain("float16") == FLOAT16


@pytest.mark.parametrize(
    "text",
    [
        "", "int8", "int8_int8", "bfloat16_bfloat16", "float32_", "_float32", "float64", "BFLOAT16",
        "bfloat16 ", "bfloat16\n", "int8__bfloat16", "int8_bfloat16_", "float32_float32", "q4_bfloat16",
        "codec", "__class__", "auto",
    ],
)  # fmt: skip
def test_text_that_is_not_the_one_spelling_is_unknown(text: str) -> None:
    assert parse_numerics(text) is None


@given(st.text(max_size=40))
def test_any_text_is_unknown_or_gives_itself_back(text: str) -> None:
    numerics = parse_numerics(text)
    assert numerics is None or str(numerics) == text


@pytest.mark.parametrize(
    "pair", [("int2", "bfloat16"), ("bfloat16", "int8"), ("", "float32"), ("float32", "")]
)
def test_formats_that_there_are_not_are_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="no numerics are called"):
        Numerics(pair[0], cast(Codec, pair[1]))
    with pytest.raises(ValueError, match="nothing is computed in"):
        plain("int8")


@pytest.mark.parametrize("weights", CODECS)
@pytest.mark.parametrize("compute", CODECS)
def test_bytes_are_those_of_torch(weights: str, compute: Codec) -> None:
    numerics = Numerics(weights, compute)
    stored: torch.dtype = getattr(torch, weights)
    computed: torch.dtype = getattr(torch, compute)
    assert numerics.weight_bytes(1001) == torch.zeros(1001, dtype=stored).nbytes
    assert numerics.bytes_per_weight == stored.itemsize
    assert numerics.row_bytes(320) == row_bytes(320, compute) == torch.zeros(320, dtype=computed).nbytes


@pytest.mark.parametrize(
    ("hops", "codec"),
    [
        ((FLOAT32, FLOAT32), "float32"),
        ((BFLOAT16,), "bfloat16"),
        ((BFLOAT16, BFLOAT16), "bfloat16"),
        ((FLOAT16, FLOAT16), "float16"),
        ((Numerics("int8", "bfloat16"), BFLOAT16), "bfloat16"),  # weights do not travel
        ((FLOAT16, BFLOAT16), "float32"),
        ((BFLOAT16, FLOAT32), "float32"),
        ((), "float32"),
    ],
)
def test_what_travels_loses_nothing_of_what_any_hop_computes(
    hops: tuple[Numerics, ...], codec: Codec
) -> None:
    assert common_codec(hops) == codec


def test_quantised_weights_take_what_their_bits_and_scales_take() -> None:
    bits = {name: 8 * Numerics(name, "bfloat16").bytes_per_weight for name in QUANTISED}
    assert bits == {"int8": 8, "int4": 5, "nf4": 4.5}
    assert Numerics("int4", "bfloat16").weight_bytes(1001) == 626


def test_only_what_was_calibrated_has_a_reference() -> None:
    assert {reference_for(each) for each in (FLOAT32, BFLOAT16, FLOAT16)} == {BFLOAT16}
    assert reference_for(None) is None
    others = [Numerics(weights, codec) for weights in CODECS for codec in CODECS if weights != codec]
    assert len(others) == 6
    assert not any(reference_for(each) for each in others)


@pytest.mark.parametrize("weights", QUANTISED)
def test_quantised_weights_are_audited_with_the_same_weights(weights: str) -> None:
    for codec in CODECS:
        reference = reference_for(Numerics(weights, codec))
        assert reference is not None and reference == Numerics(weights, "bfloat16")
        assert reference.exact == Numerics(weights, "float32")
    assert BFLOAT16.exact == FLOAT32


def test_outputs_are_compared_only_where_one_reference_is_for_both() -> None:
    quantised = Numerics("int8", "bfloat16")
    assert are_comparable(FLOAT32, BFLOAT16)
    assert not are_comparable(quantised, BFLOAT16)
    assert are_comparable(quantised, Numerics("int8", "float32"))
    assert not are_comparable(quantised, Numerics("int4", "bfloat16"))
    strange = Numerics("bfloat16", "float32")
    assert not are_comparable(strange, strange)
    assert not are_comparable(None, None)
