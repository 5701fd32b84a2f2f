"""Forward and backward passes of a span over a microbatch, block by block.

Both are generators that stop after each block, so that whoever runs them can do other work in between: a
decode step waits for one block of a microbatch, and not for all of it.

A forward pass keeps the input of every block. Backward runs each block once more from it, with a graph, and
takes the gradients: one pass more than with all activations kept, at a tenth of the memory. What is kept of
a microbatch may be dropped; the same numbers come from the span's own input again.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from p2pinfer.models.compute.blocks import Blocks
from p2pinfer.models.span import BlockSpan

from .adapter import NO_ADAPTER, Adapter, BlockAdapter
from .block_pass import run_block
from .products import Dropout
from .rows import Rows

_Result = TypeVar("_Result")
Pass: TypeAlias = Generator[None, None, _Result]  # each stop is after a block


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Work of one pass: which blocks, which sequences, which adapter.

    Attributes:
        span: The blocks, all among those of the passes.
        rows: The sequences, on the device.
        adapter: What is applied; None: nothing.
        seed: Decides what dropout drops; 0: nothing.
    """

    span: BlockSpan
    rows: Rows
    adapter: Adapter | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Forwarded:
    """Results of a forward pass.

    Attributes:
        output: (tokens, hidden_size), the blocks' dtype, on their device.
        inputs: What went into each block, the same shape.
    """

    output: Tensor
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Gradients:
    """Results of a backward pass.

    Attributes:
        hidden: Of the span's input, (tokens, hidden_size) in the blocks' dtype; None if it was not wanted.
        adapter: Of the adapter's vector, float32; None without an adapter.
    """

    hidden: Tensor | None
    adapter: Tensor | None


class SpanPasses:
    """Passes over the blocks of a runner, whose weights stay as they are. Belongs to the runner's thread."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    def forward(self, batch: Microbatch, hidden: Tensor) -> Pass[Forwarded]:
        """Run the span.

        Args:
            hidden: (tokens, hidden_size), any float dtype, any device.
        """
        hidden = hidden.to(self.blocks.device, self.blocks.dtype)
        inputs: list[Tensor] = []
        for block in range(batch.span.start, batch.span.stop):
            inputs.append(hidden)
            with torch.no_grad():
                hidden = self._run(batch, block, hidden, _part(batch, block))
            yield
        return Forwarded(hidden, tuple(inputs))

    def backward(
        self, batch: Microbatch, inputs: tuple[Tensor, ...], gradient: Tensor, *, wants_hidden: bool = True
    ) -> Pass[Gradients]:
        """Gradients of a loss whose gradient in the span's output is `gradient`.

        Args:
            inputs: What went into each block, of a forward pass of the same microbatch.
            wants_hidden: False if nobody needs the gradient of the span's input. Then blocks before the first
                one that the adapter changes are left out.
        """
        gradient = gradient.to(self.blocks.device, self.blocks.dtype)
        adapter = batch.adapter
        of_adapter = None if adapter is None else torch.zeros_like(adapter.values)
        least = batch.span.start
        if not wants_hidden:
            first = None if adapter is None else adapter.first_block(batch.span)
            least = batch.span.stop if first is None else first
        for block in reversed(range(least, batch.span.stop)):
            part = _part(batch, block).with_gradients()
            needs_hidden = wants_hidden or block > least
            with torch.enable_grad():
                hidden = inputs[block - batch.span.start].detach().requires_grad_(needs_hidden)
                output = self._run(batch, block, hidden, part)
                wanted = [*([hidden] if needs_hidden else []), *part.tensors()]
                gradients = list(torch.autograd.grad(output, wanted, gradient))
            if needs_hidden:
                gradient = gradients.pop(0)
            if adapter is not None and of_adapter is not None:
                for into, found in zip(adapter.of_block(block, of_adapter).tensors(), gradients, strict=True):
                    into.copy_(found)
            yield
        return Gradients(gradient if wants_hidden else None, of_adapter)

    def _run(self, batch: Microbatch, block: int, hidden: Tensor, part: BlockAdapter) -> Tensor:
        blocks, index = self.blocks, block - self.blocks.span.start
        return run_block(
            blocks.layers(index),
            blocks.architecture,
            blocks.windows[index],
            hidden,
            blocks.rotations(batch.rows.positions)[block],
            batch.rows,
            part,
            Dropout(batch.seed),
        )


def _part(batch: Microbatch, block: int) -> BlockAdapter:
    return NO_ADAPTER if batch.adapter is None else batch.adapter.of_block(block)


def complete(running: Pass[_Result]) -> _Result:
    """Result of a pass, run to its end."""
    while True:
        try:
            next(running)
        except StopIteration as stop:
            result: _Result = stop.value
            return result
