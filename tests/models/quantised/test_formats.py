"""Formats of quantised weights against their definitions, number by number."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from p2pinfer.models.quantised.formats import (
    FORMATS,
    INT4,
    INT8,
    NF4,
    Packed,
    blank,
    in_bytes,
    in_order,
    quantise,
    quantise_into,
)


def weight_of(rows: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)) * 0.02


def lists(matrix: Tensor) -> list[list[float]]:
    return [[float(number) for number in row] for row in matrix.unbind()]


def by_the_book(row: list[float], group: int, name: str) -> list[float]:
    """What a row becomes, in Python's own numbers."""
    size = group or len(row)
    found: list[float] = []
    for start in range(0, len(row), size):
        numbers = row[start : start + size]
        largest = max(map(abs, numbers))
        if name == "nf4":
            nearest = [min(NF4.values, key=lambda code: abs(x / largest - code)) for x in numbers]
            found += torch.tensor([largest * code for code in nearest]).bfloat16().tolist()
            continue
        signed = next(x for x in numbers if abs(x) == largest)
        if name == "int8":
            scales, low, high = [float(torch.tensor(largest / 127).bfloat16())], -127, 127
        else:
            fraction, exponent = math.frexp(signed / -8)
            # Numbers of five bits by their order: 16 to 31 times a power of two, then twice 16 to 31.
            place = 16 * exponent + math.trunc(abs(fraction) * 32) - 16
            nearby = (divmod(place + step, 16) for step in (0, 1, -1, 2, -2))
            scales = [math.copysign(math.ldexp(16 + m, e - 5), fraction) for e, m in nearby]
            low, high = -8, 7
        tried = [[max(low, min(high, round(x / scale))) * scale for x in numbers] for scale in scales]
        found += min(tried, key=lambda held: math.dist(held, numbers))
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_those_of_the_definition(name: str) -> None:
    weight = weight_of(5, 128)
    laid_out = quantise(weight, FORMATS[name]).dense(torch.float32)
    for row, got in zip(lists(weight), lists(laid_out), strict=True):
        expected = by_the_book(row, FORMATS[name].group, name)
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "error", "bits"), [("int8", 0.009, 8), ("int4", 0.09, 4.5), ("nf4", 0.096, 4.5)]
)
def test_error_and_size_are_what_the_format_costs(name: str, error: float, bits: float) -> None:
    weight = weight_of(256, 1024)
    packed = quantise(weight.bfloat16(), FORMATS[name])
    assert packed.nbytes * 8 / weight.numel() == pytest.approx(bits, rel=0.003)
    difference = packed.dense(torch.float32) - weight.bfloat16().float()
    assert (difference.square().sum() / weight.square().sum()).sqrt().item() < error


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("inputs", [1, 31, 33, 100, 320])
def test_rows_of_any_length_keep_it(name: str, inputs: int) -> None:
    weight = weight_of(3, inputs)
    laid_out = quantise(weight, FORMATS[name]).dense(torch.float32)
    assert laid_out.shape == weight.shape
    for row, got in zip(lists(weight), lists(laid_out), strict=True):
        expected = by_the_book(row, FORMATS[name].group, name)
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros_and_single_numbers_are_met(name: str) -> None:
    weight = torch.zeros(4, 64)
    weight[1, 5], weight[2, 40] = -1.0, 2.0
    assert torch.equal(quantise(weight, FORMATS[name]).dense(torch.float32), weight) or name == "int8"
    assert torch.allclose(quantise(weight, FORMATS[name]).dense(torch.float32), weight, rtol=0.004)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_laid_out_in_16_bits_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    packed = quantise(weight_of(64, 320), FORMATS[name])
    assert torch.equal(packed.dense(dtype), packed.dense(torch.float32).to(dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_bfloat16_holds_what_codes_stand_for(name: str) -> None:
    """So every kernel computes with the same weights, whatever it lays out."""
    for weight in (weight_of(64, 320), weight_of(64, 320) ** 3 * 1e6):
        packed = quantise(weight, FORMATS[name])
        (matrix, scales), exact = packed.laid_out(torch.bfloat16), packed.dense(torch.float32)
        whole = matrix.float() if scales is None else matrix.float() * scales.float()[:, None]
        assert torch.equal(whole, exact)


@pytest.mark.parametrize("name", FORMATS)
def test_parts_of_a_product_may_be_quantised_apart_and_in_any_chunks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight_of(96, 128)
    whole = quantise(weight, FORMATS[name])
    monkeypatch.setattr("p2pinfer.models.quantised.formats._AT_ONCE", {"cpu": 1000})
    parts = blank(96, 128, FORMATS[name], weight.device)
    for rows in (slice(0, 32), slice(32, 48), slice(48, 96)):
        quantise_into(parts.rows(rows), weight[rows])
    assert torch.equal(parts.codes, whole.codes) and torch.equal(parts.scales, whole.scales)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    mixed: Packed = whole.rows(order)
    assert torch.equal(mixed.dense(torch.float32), whole.dense(torch.float32)[order])


def test_four_bits_lie_as_in_blocks_of_gguf() -> None:
    """Number i of 32 in the lower half of byte i, number i + 16 in the upper one."""
    codes = torch.arange(64, dtype=torch.uint8).remainder(16).view(1, 64)
    packed = in_bytes(codes)
    assert packed.shape == (1, 32)
    assert packed[0, 3] == codes[0, 3] | codes[0, 19] << 4
    assert packed[0, 16] == codes[0, 32] | codes[0, 48] << 4
    assert torch.equal(in_order(packed), codes)


def test_codes_of_nf4_are_quantiles_of_a_normal_distribution() -> None:
    """QLoRA, section 3: eight below and nine from zero on, both ends met, zero exact, thinner outwards."""
    assert (NF4.values[0], NF4.values[7], NF4.values[15]) == (-1.0, 0.0, 1.0)
    offset = 0.9677083  # of the distribution's mass, where the outermost quantile lies; the paper's code
    quantile = NormalDist().inv_cdf
    upper = [quantile(offset + (0.5 - offset) * step / 8) for step in range(8)]
    lower = [-quantile(offset + (0.5 - offset) * step / 7) for step in range(7)]
    expected = sorted((*lower, 0.0, *upper))
    assert NF4.values == pytest.approx([each / expected[-1] for each in expected], abs=1e-5)


def test_formats_differ_in_what_they_cost() -> None:
    assert (INT8.group, INT4.group, NF4.group) == (0, 32, 64)
    assert math.isclose(sum(INT4.values), -8)
