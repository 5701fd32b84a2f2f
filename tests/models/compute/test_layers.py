from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from p2pinfer.models.compute import layers
from p2pinfer.models.compute.layers import Linear, RmsNorm, can_pack, padded_rows

from ..bounds import bound_of_product

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3, 64, 70])
def test_a_product_is_the_same_however_its_weight_is_laid_out(dtype: torch.dtype, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    weight, bias = torch.randn(90, 50, generator=generator), torch.randn(90, generator=generator)
    rows = torch.randn(tokens, 60, generator=generator)[
        :, 5:55
    ]  # not contiguous, as half of a product is not
    for given in (None, bias):
        narrow = None if given is None else given.to(dtype)
        product = Linear(weight.to(dtype), narrow)(rows.to(dtype))
        assert product.dtype == dtype
        exact = functional.linear(
            rows.to(dtype).double(), weight.to(dtype).double(), None if narrow is None else narrow.double()
        )
        bound = bound_of_product(rows.to(dtype), weight.to(dtype), narrow)
        assert ((product.double() - exact).abs() <= bound).all()


def test_few_numbers_of_rows_are_told_apart() -> None:
    padded = [padded_rows(count) for count in range(1, 1025)]
    assert padded[:16] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 12, 12, 14, 14, 16, 16]
    assert all(count <= rows <= count * 1.25 for count, rows in enumerate(padded, start=1))
    assert len(set(padded)) == 36
    assert {64, 128, 256, 512, 1024} < set(padded)


def test_only_dtypes_with_kernels_on_a_cpu_are_packed() -> None:
    assert not can_pack(CPU, torch.float16)
    assert not can_pack(torch.device("meta"), torch.float32)


def test_without_onednn_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_MKLDNN", object())
    assert not can_pack(CPU, torch.float32)


def test_a_norm_in_float32_serves_rows_of_less() -> None:
    weight = 1 + torch.arange(64) / 1000
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = functional.rms_norm(rows, (64,), weight, 1e-6)
    torch.testing.assert_close(RmsNorm(weight, 1e-6)(rows), expected)
    narrow = RmsNorm(weight, 1e-6)(rows.bfloat16())
    assert narrow.dtype == torch.bfloat16
    exact = functional.rms_norm(rows.bfloat16().float(), (64,), weight, 1e-6)
    # One rounding at the end, half a unit of which is lost; the other half covers float32.
    torch.testing.assert_close(narrow.float(), exact, atol=0, rtol=torch.finfo(torch.bfloat16).eps)
