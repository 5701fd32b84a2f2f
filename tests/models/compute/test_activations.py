from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from transformers import activations

from p2pinfer.models.compute.activations import ACTIVATIONS

Activation: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_activation_and_its_gradient_are_those_of_transformers(name: str) -> None:
    torch.manual_seed(0)
    rows = torch.randn(50, dtype=torch.float32) * 4
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    theirs: dict[str, Activation] = vars(activations)["ACT2FN"]
    for function in (ACTIVATIONS[name], theirs[name]):
        leaf = rows.clone().requires_grad_()
        output = function(leaf)
        [gradient] = torch.autograd.grad(output.sum(), leaf)
        found.append((output.detach(), gradient))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
