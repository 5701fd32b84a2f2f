"""Microbatches with their gradients by transformers and peft, in the form that these passes take."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.blocks import Blocks, load_blocks
from p2pinfer.models.compute.target import Target
from p2pinfer.models.learning.adapter import ATTENTION, PROJECTIONS, AdapterLayout, LowRank
from p2pinfer.models.learning.rows import Rows
from p2pinfer.models.numerics import plain
from p2pinfer.models.span import BlockSpan

peft: Any = pytest.importorskip("peft", reason="the oracle of adapters: pip install '.[dev]'")
BLOCKS = 4
PROMPT_TOKENS = 3
RANKS = {"self_attn.q_proj": 2, "mlp.down_proj": 5}


@dataclass(frozen=True)
class Expected:
    """A microbatch with its results by torch's own autograd through transformers' layers and peft's LoRA.

    The tokens are those of the sequences, without the padding.
    """

    rows: Rows
    hidden: Tensor  # (tokens, hidden_size)
    output: Tensor
    of_output: Tensor  # the gradient that comes in
    of_hidden: Tensor  # and those that go out
    factors: dict[tuple[int, str], tuple[Tensor, Tensor]]
    of_factors: dict[tuple[int, str], tuple[Tensor, Tensor]]
    prompts: Tensor  # (blocks, PROMPT_TOKENS, hidden_size)
    of_prompts: Tensor
    scales: dict[str, float]

    def layout(self, span: BlockSpan) -> AdapterLayout:
        updates = tuple(
            LowRank(block, name, len(self.factors[block, name][0]), self.scales[name])
            for block, name in sorted(self.factors)
            if span.start <= block < span.stop
        )
        return AdapterLayout(updates, PROMPT_TOKENS)

    def vector(self, span: BlockSpan, *, gradient: bool = False) -> Tensor:
        """Values of the span's adapter, or their expected gradient."""
        factors = self.of_factors if gradient else self.factors
        prompts = self.of_prompts if gradient else self.prompts
        parts = [
            each.flatten()
            for key in sorted(factors)
            if span.start <= key[0] < span.stop
            for each in factors[key]
        ]
        return torch.cat([*parts, prompts[span.start : span.stop].flatten()])


def blocks_of(checkpoint: Checkpoint, span: BlockSpan, dtype: str = "float32") -> Blocks:
    return load_blocks(checkpoint, span, Target(torch.device("cpu"), plain(dtype)))


@pytest.fixture
def expect(oracle: Callable[..., PreTrainedModel]) -> Callable[..., Expected]:
    """`expect(checkpoint, lengths, side)`: a padded batch through all blocks, side "left" or "right"."""

    def expected(checkpoint: Checkpoint, lengths: list[int], side: str, *, seed: int = 0) -> Expected:
        torch.manual_seed(seed)
        base: Any = copy.deepcopy(oracle(checkpoint.folder))
        base.model.norm = torch.nn.Identity()
        family = checkpoint.spec.family
        names = ATTENTION if family == "mixtral" else PROJECTIONS
        targets = [name.split(".")[-1] for name in names]
        config: Any = peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=targets,
            rank_pattern={name.split(".")[-1]: rank for name, rank in RANKS.items() if name in names},
            init_lora_weights=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers what it renamed
            model: Any = peft.get_peft_model(base, config)
        layers = base.model.layers
        size, longest = checkpoint.spec.hidden_size, max(lengths)
        prompts = (torch.randn(BLOCKS, PROMPT_TOKENS, size) * 0.3).requires_grad_()
        mask = torch.zeros(len(lengths), longest, dtype=torch.long)
        for row, length in enumerate(lengths):
            start = longest - length if side == "left" else 0
            mask[row, start : start + length] = 1
        kept = mask.bool()
        order = (mask.cumsum(1) - 1).masked_fill(~kept, PROMPT_TOKENS)

        def add_prompt(block: int) -> Callable[..., Any]:
            def hook(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                padded = torch.cat((prompts[block], torch.zeros(1, size)))
                return (args[0] + padded[order.clamp(max=PROMPT_TOKENS)], *args[1:])

            return hook

        for block, layer in enumerate(layers):
            layer.register_forward_pre_hook(add_prompt(block))
        hidden = (torch.randn(len(lengths), longest, size) * 0.5).requires_grad_()
        of_output = torch.randn(len(lengths), longest, size) * kept[..., None]
        output = base.model(inputs_embeds=hidden, attention_mask=mask, use_cache=False).last_hidden_state
        factors: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        scales: dict[str, float] = {}
        for block, layer in enumerate(layers):
            for name in names:
                lora = layer.get_submodule(name)
                factors[block, name] = (lora.lora_A["default"].weight, lora.lora_B["default"].weight)
                scales[name] = lora.scaling["default"]
        flat = [each for pair in factors.values() for each in pair]
        found = torch.autograd.grad(output, [hidden, prompts, *flat], of_output)
        pairs = iter(found[2:])
        del model
        return Expected(
            Rows(
                lengths,
                torch.arange(longest).expand(len(lengths), -1)[kept],
                torch.cat([torch.arange(n) for n in lengths]),
            ),
            hidden.detach()[kept],
            output.detach()[kept],
            of_output[kept],
            found[0][kept],
            {key: (a.detach(), b.detach()) for key, (a, b) in factors.items()},
            {key: (next(pairs), next(pairs)) for key in factors},
            prompts.detach(),
            found[1],
            scales,
        )

    return expected
