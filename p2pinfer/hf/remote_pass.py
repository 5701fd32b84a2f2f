"""Passes over the swarm as torch's autograd sees them, and padded batches as the swarm does."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from p2pinfer.errors import LocalError
from p2pinfer.learning.swarm_trainer import Batch
from p2pinfer.learning.trained_adapter import ModelAdapter
from p2pinfer.loops.blocking import BlockingRows, BlockingTrainer
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.learning.adapter import Factors, LowRank
from p2pinfer.models.learning.rows import Rows
from p2pinfer.models.span import BlockSpan

_SEEDS: Final = 1 << 20  # a call's; its microbatches have 4096 of their own each


@dataclass(frozen=True, slots=True)
class Positions:
    """Place of a padded batch's tokens.

    Attributes:
        rows: The sequences without padding.
        kept: (batch, seq) bool, or None if there is no padding.
        shape: batch, seq.
    """

    rows: Rows
    kept: Tensor | None
    shape: tuple[int, int]

    @staticmethod
    def of(
        hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, before: int = 0
    ) -> Positions:
        """The places of `hidden`, (batch, seq, hidden_size).

        Args:
            attention_mask: (batch, before + seq).
            before: Tokens of a prefix, which every row sees whole.

        Raises:
            LocalError: The mask is no (batch, seq), or nothing is left of the batch.
        """
        batch, length = hidden.shape[:2]
        order = torch.arange(before, before + length).expand(batch, length)
        places = order if position_ids is None else position_ids.cpu().long().expand(batch, length)
        if attention_mask is None:
            return Positions(Rows([length] * batch, places.flatten(), order.flatten()), None, (batch, length))
        if attention_mask.shape != (batch, before + length):
            raise LocalError(
                f"an attention mask of shape {tuple(attention_mask.shape)}; on the swarm it is (batch, seq), "
                f"here ({batch}, {before + length}), and causality goes without saying"
            )
        kept = attention_mask.cpu().bool()
        if not bool(kept[:, :before].all()):
            raise LocalError("the attention mask hides a part of the prefix, which every row sees whole")
        kept = kept[:, before:]
        lengths = [int(count) for count in kept.sum(1) if count]
        if not lengths:
            raise LocalError("the attention mask hides every token")
        mask = None if bool(kept.all()) else kept
        return Positions(Rows(lengths, places[kept], order[kept]), mask, (batch, length))

    def pack(self, hidden: Tensor) -> Tensor:
        """(batch, seq, hidden_size) -> (tokens, hidden_size)."""
        return hidden.flatten(0, 1) if self.kept is None else hidden[self.kept.to(hidden.device)]

    def unpack(self, packed: Tensor) -> Tensor:
        """(tokens, hidden_size) -> (batch, seq, hidden_size), with zeros for padding."""
        if self.kept is None:
            return packed.view(*self.shape, -1)
        row, column = torch.where(self.kept.to(packed.device))
        empty = packed.new_zeros(*self.shape, packed.shape[-1])
        return empty.index_put((row, column), packed)


@dataclass(frozen=True, slots=True)
class _Call:
    """Everything of a pass beside its tensors."""

    trainer: BlockingTrainer
    rows: Rows
    span: BlockSpan
    adapter: ModelAdapter | None
    keeps: bool
    seed: int


class RemotePasses:
    """Passes of one model over a swarm.

    Attributes:
        spec: The model.
        trainer: Does them.
        open_rows: Makes sessions for rows that grow.
    """

    def __init__(
        self,
        spec: ModelSpec,
        trainer: BlockingTrainer,
        open_rows: Callable[[ModelAdapter | None], BlockingRows],
    ) -> None:
        self.spec = spec
        self.trainer = trainer
        self.open_rows = open_rows
        self._last: tuple[Any, ModelAdapter, list[Tensor]] | None = None

    def run(
        self,
        packed: Tensor,
        rows: Rows,
        span: BlockSpan,
        updates: Sequence[LowRank],
        factors: Sequence[Tensor],
        prompts: nn.Parameter | None,
    ) -> Tensor:
        """(tokens, hidden_size) after `span`; differentiable in all tensors.

        Args:
            factors: A and B of each update, in turn.
            prompts: (num_blocks, tokens, hidden_size).
        """
        tensors: list[Tensor] = [*factors, *(() if prompts is None else (prompts,))]
        adapter = self.adapter(updates, tensors, has_prompts=prompts is not None)
        keeps = torch.is_grad_enabled() and any(each.requires_grad for each in (packed, *tensors))
        drops = any(each.dropout for each in updates)
        seed = random.Random(int(torch.randint(1 << 62, ()))).randrange(1, _SEEDS) if drops else 0
        call = _Call(self.trainer, rows, span, adapter, keeps, seed)
        return cast(Tensor, _Pass.apply(call, packed, *tensors))  # type: ignore[no-untyped-call]  # torch's

    def adapter(
        self, updates: Sequence[LowRank], tensors: Sequence[Tensor], *, has_prompts: bool
    ) -> ModelAdapter | None:
        """The adapter of these values; the last one as long as no value has changed."""
        if not tensors:
            return None
        # By value: optimisers that update in one fused call leave no trace in the tensors' versions.
        values = [each.detach().to("cpu", torch.float32) for each in tensors]
        form = (tuple(updates), has_prompts, tuple(each.shape for each in values))
        if self._last is None or self._last[0] != form or not _are_equal(self._last[2], values):
            # Copies: an optimiser changes its own in place, and a pass may be run again after that.
            values = [each.clone() for each in values]
            pairs = values[: 2 * len(updates)]
            factors = [Factors(*pairs[at : at + 2]) for at in range(0, len(pairs), 2)]
            adapter = ModelAdapter(updates, factors, values[-1] if has_prompts else None)
            self._last = (form, adapter, values)
        return self._last[1]


def _are_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


class _Pass(torch.autograd.Function):
    """One pass there, and one back if a gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, call: _Call, packed: Tensor, *tensors: Tensor) -> Tensor:
        ctx.call, ctx.device, ctx.dtype = call, packed.device, packed.dtype
        ctx.forms = [(each.device, each.dtype) for each in tensors]
        batch = Batch(call.rows, packed.detach().cpu())
        trace = call.trainer.forward(batch, call.adapter, span=call.span, keeps=call.keeps, seed=call.seed)
        ctx.trace = trace if call.keeps else None
        return trace.output.to(packed.device, packed.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        call: _Call = ctx.call
        wants_hidden = ctx.needs_input_grad[1]
        hidden, adapter = call.trainer.backward(
            ctx.trace, gradients[0].detach().cpu(), wants_hidden=wants_hidden
        )
        if hidden is not None:
            hidden = hidden.to(ctx.device, ctx.dtype)
        found: list[Tensor | None] = []
        if adapter is not None:
            found += [*adapter.tensors, *(() if adapter.prompts is None else (adapter.prompts,))]
        forms = zip(found, ctx.forms, ctx.needs_input_grad[2:], strict=True)
        return (
            None,
            hidden,
            *(
                each.to(device, dtype) if each is not None and wanted else None
                for each, (device, dtype), wanted in forms
            ),
        )
