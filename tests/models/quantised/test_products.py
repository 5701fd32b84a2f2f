"""Products with quantised weights against the weights laid out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pinfer.models.compute.target import Target
from p2pinfer.models.learning.products import product
from p2pinfer.models.numerics import Numerics
from p2pinfer.models.quantised import products
from p2pinfer.models.quantised.cpu_products import Int4OnCpu, Int8OnCpu, can_multiply_int4
from p2pinfer.models.quantised.formats import FORMATS, quantise
from p2pinfer.models.quantised.products import PlainProduct, QuantisedLinear, choose_product


@pytest.fixture(autouse=True)
def nothing_found() -> Iterator[None]:
    """Tests of products that were found right elsewhere are made again here."""
    products.found_products.clear()
    yield
    products.found_products.clear()


def weight_of(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs)) * 0.02


def rows_of(count: int, inputs: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(count)).to(dtype)


def size_of(tensor: Tensor) -> float:
    return tensor.float().square().sum().sqrt().item()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("outputs", "inputs"), [(128, 256), (100, 320), (64, 100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_of_all_sizes_are_those_of_the_weight_laid_out(
    name: str, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    packed = quantise(weight_of(outputs, inputs), FORMATS[name])
    exact = packed.dense(torch.float32)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(7)).to(dtype)
    layer = QuantisedLinear(packed, dtype, bias)
    assert torch.equal(layer.dense(), exact.to(dtype))
    for count in (1, 2, 8, 9, 24, 48, 130):
        rows = rows_of(count, inputs, dtype)
        right = rows.float() @ exact.t() + bias.float()
        got = layer(rows)
        assert got.dtype == dtype
        assert size_of(got.float() - right) < 0.006 * size_of(right)


@pytest.mark.parametrize(("name", "kind"), [("int8", Int8OnCpu), ("int4", Int4OnCpu)])
def test_a_processor_uses_kernels_of_torch_for_sizes_that_they_take(name: str, kind: type) -> None:
    packed = quantise(weight_of(128, 256), FORMATS[name])
    if kind is Int4OnCpu and not can_multiply_int4(packed):
        pytest.skip("this processor's layout is none that is known")
    assert isinstance(choose_product(packed, torch.bfloat16), kind)
    odd = choose_product(quantise(weight_of(100, 100), FORMATS[name]), torch.bfloat16)
    assert isinstance(odd, PlainProduct)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_kernel_that_is_wrong_is_found_said_and_not_used(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As two equal cards of one name were seen to differ."""
    for kind in (Int8OnCpu, Int4OnCpu):
        right = kind.__call__

        def wrong(self: object, rows: Tensor, right: Any = right) -> Any:
            return right(self, rows) * (1 if len(rows) == 1 else 1.1)

        monkeypatch.setattr(kind, "__call__", wrong)
    packed = quantise(weight_of(128, 256), FORMATS[name])
    with caplog.at_level(logging.WARNING):
        chosen = [choose_product(packed, torch.bfloat16) for _ in range(3)]
    assert all(isinstance(each, PlainProduct) for each in chosen)
    assert caplog.messages == [
        f"this computer's fast products of {name} weights are wrong by 10 % with 2 rows; "
        "slower ones are used instead"
    ]


def test_a_kernel_that_cannot_be_had_is_said_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel image is available\nand more lines")

    monkeypatch.setattr(products, "_is_right", fail)
    with caplog.at_level(logging.WARNING):
        chosen = choose_product(quantise(weight_of(128, 256), FORMATS["int8"]), torch.bfloat16)
    assert isinstance(chosen, PlainProduct)
    assert caplog.messages == [
        "products of int8 weights are computed slowly on cpu: no kernel image is available"
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_that_is_laid_out_computes_with_the_same_numbers(name: str) -> None:
    packed = quantise(weight_of(128, 256), FORMATS[name])
    cpu = torch.device("cpu")
    laid_out = Target(cpu, Numerics(name, "float32"), laid_out=True).linear(packed)
    held = Target(cpu, Numerics(name, "bfloat16")).linear(packed)
    rows = rows_of(4, 256, torch.bfloat16)
    right = laid_out(rows.float())
    assert size_of(held(rows).float() - right) < 0.006 * size_of(right)
    assert torch.equal(laid_out.dense(), packed.dense(torch.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_pass_through_a_quantised_layer(name: str) -> None:
    packed = quantise(weight_of(64, 128), FORMATS[name])
    rows = rows_of(3, 128, torch.float32).requires_grad_()
    (gradient,) = torch.autograd.grad(product(QuantisedLinear(packed, torch.float32), rows).sum(), rows)
    expected = packed.dense(torch.float32).sum(0).expand(3, -1)
    assert torch.allclose(gradient, expected, atol=1e-5)
