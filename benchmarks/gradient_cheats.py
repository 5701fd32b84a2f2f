"""Lies in passes of training, by the names of `lying_node.py`: grad-zeros, -stale, -scaled, -sign, -skip.

The others of its weights, such as int8, lie in training as in texts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

import p2pinfer.node.training.train_server as train_server
from p2pinfer.models.compute.blocks import Blocks
from p2pinfer.models.learning.adapter import BlockAdapter
from p2pinfer.models.learning.span_passes import Gradients, Microbatch, SpanPasses

Change = Callable[[Tensor], Tensor]
PREFIX = "grad-"
CHANGES: Mapping[str, Change] = {
    "zeros": lambda each: each * 0,
    "scaled": lambda each: each * 0.9,
    "sign": lambda each: -each,
}


class LyingPasses(SpanPasses):
    """Passes of a node that lies in a share of its backward passes, or leaves a block out."""

    def __init__(self, blocks: Blocks, name: str, share: float) -> None:
        super().__init__(blocks)
        self._name = name
        self._share = share
        self._rng = random.Random(0)
        self._former: dict[tuple[Any, ...], Gradients] = {}
        self._skipped = (blocks.span.start + blocks.span.stop) // 2

    def backward(
        self, batch: Microbatch, inputs: tuple[Tensor, ...], gradient: Tensor, **options: Any
    ) -> Generator[None, None, Gradients]:
        """See `SpanPasses`."""
        found = yield from super().backward(batch, inputs, gradient, **options)
        key = (
            batch.rows.lengths,
            *(None if each is None else each.shape for each in (found.hidden, found.adapter)),
        )
        former = self._former.setdefault(key, found)
        if self._rng.random() >= self._share or self._name == "skip":
            return found
        if self._name == "stale":
            return former
        change = CHANGES[self._name]
        return replace(
            found,
            hidden=None if found.hidden is None else change(found.hidden),
            adapter=None if found.adapter is None else change(found.adapter),
        )

    def _run(self, batch: Microbatch, block: int, hidden: Tensor, part: BlockAdapter) -> Tensor:
        if self._name == "skip" and block == self._skipped:
            return hidden + sum(each.sum() * 0 for each in part.tensors())
        return super()._run(batch, block, hidden, part)


def install(name: str, share: float) -> None:
    """Have nodes of this process lie so."""

    def made(blocks: Blocks) -> LyingPasses:
        return LyingPasses(blocks, name.removeprefix(PREFIX), share)

    vars(train_server)["SpanPasses"] = made
