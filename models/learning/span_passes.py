"""Forward and backward passes of a span over a microbatch, block by block.

Both are generators that stop after each block, so that whoever runs them can do other work in between: a
decode step waits for one block of a microbatch, and not for all of it.

A forward pass keeps the input of every block. Backward runs each block once more from it, with a graph, and
takes the gradients: one pass more than with all activations kept, at a tenth of the memory. Where there is
memory, the graphs of the last blocks are kept as well, and backward takes the gradients from those. Anything
kept of a microbatch may be dropped; the same numbers come from the span's own input again.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

import torch
from torch import Tensor

from p2pinfer.models.compute.blocks import BlockLayers, Blocks
from p2pinfer.models.compute.layers import AnyLinear
from p2pinfer.models.compute.mlp import ExpertMlp, FeedForward
from p2pinfer.models.span import BlockSpan

from .adapter import NO_ADAPTER, Adapter, BlockAdapter
from .block_pass import run_block
from .products import Dropout
from .rows import Rows

_Result = TypeVar("_Result")
_FLOAT16_LOG2: Final = 4  # of a gradient's largest value; blocks may enlarge it a thousand times
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
        graphs: By block, of those for which there was memory. Each serves one backward pass.
    """

    output: Tensor
    inputs: tuple[Tensor, ...]
    graphs: Graphs


@dataclass(frozen=True, slots=True)
class BlockGraph:
    """One block's forward pass with all that its gradients take.

    Attributes:
        size: Bytes that it holds.
    """

    hidden: Tensor
    part: BlockAdapter
    output: Tensor
    size: int


Graphs: TypeAlias = dict[int, BlockGraph]


@dataclass(frozen=True, slots=True)
class Gradients:
    """Results of a backward pass.

    Attributes:
        hidden: Of the span's input, (tokens, hidden_size) in the blocks' dtype, or float32 for float16;
            None if it was not wanted.
        adapter: Of the adapter's vector, float32; None without an adapter.
    """

    hidden: Tensor | None
    adapter: Tensor | None


class SpanPasses:
    """Passes over the blocks of a runner, whose weights stay as they are. Belongs to the runner's thread.

    Attributes:
        blocks: Those on the first device, where adapters lie.
        span: All that can be run.
    """

    def __init__(self, blocks: Blocks, *others: Blocks) -> None:
        """Passes over blocks, and over those that follow them on other devices."""
        self.blocks = blocks
        self.span = BlockSpan(blocks.span.start, (blocks, *others)[-1].span.stop)
        self._parts = (blocks, *others)
        self._graph_bytes = 0.0  # of one block and token, the largest so far; 0 before the first graph

    def device_of(self, block: int) -> torch.device:
        """Device that computes a block of the model."""
        return self._part_with(block).device

    def _part_with(self, block: int) -> Blocks:
        return next(each for each in self._parts if each.span.start <= block < each.span.stop)

    def keep_transposed(self, max_bytes: int) -> None:
        """Keep transposed weights for backward passes to come, as far as they fit; 0 drops them all."""
        left = max_bytes
        for block in reversed(range(self.span.start, self.span.stop)):
            blocks = self._part_with(block)
            for linear in _linears(blocks.layers(block - blocks.span.start)):
                left -= linear.transposed_bytes
                linear.keep_transposed(left >= 0 and max_bytes > 0)

    @property
    def card_free_bytes(self) -> int | None:
        """Bytes that are free on the GPU that computes, where an allocation may fail; None if none does.

        Of several GPUs those of the fullest one: any block may have a graph.
        """
        cards = [each.device for each in self._parts if each.device.type == "cuda"]
        return min(map(_free_bytes, cards), default=None)

    def forward(self, batch: Microbatch, hidden: Tensor, graph_bytes: int = 0) -> Pass[Forwarded]:
        """Run the span.

        Args:
            hidden: (tokens, hidden_size), any float dtype, any device.
            graph_bytes: Bytes that graphs may take, about.
        """
        hidden = hidden.to(self.blocks.device, self.blocks.dtype)
        inputs: list[Tensor] = []
        graphs: Graphs = {}
        with_graph = batch.span.stop - self._blocks_with_graph(batch.rows.tokens, graph_bytes)
        for block in range(batch.span.start, batch.span.stop):
            inputs.append(hidden)
            if block < with_graph:
                with torch.no_grad():
                    hidden = self._run(batch, block, hidden, _part(batch, block))
            else:
                graphs[block] = self._graph(batch, block, hidden)
                hidden = graphs[block].output.detach()
            yield
        return Forwarded(hidden, tuple(inputs), graphs)

    def _blocks_with_graph(self, tokens: int, graph_bytes: int) -> int:
        """Number of blocks whose graphs fit; of the first microbatch one, to see what they take."""
        if not self._graph_bytes:
            return min(1, graph_bytes)
        return int(graph_bytes / (self._graph_bytes * tokens))

    def _graph(self, batch: Microbatch, block: int, hidden: Tensor) -> BlockGraph:
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        part = _part(batch, block).with_gradients()
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = self._run(batch, block, leaf, part)
        size = sum(saved.values())
        self._graph_bytes = max(self._graph_bytes, size / batch.rows.tokens)
        return BlockGraph(leaf, part, output, size)

    def backward(
        self,
        batch: Microbatch,
        inputs: tuple[Tensor, ...],
        gradient: Tensor,
        *,
        wants_hidden: bool = True,
        graphs: Graphs | None = None,
    ) -> Pass[Gradients]:
        """Gradients of a loss whose gradient in the span's output is `gradient`.

        Args:
            inputs: What went into each block, of a forward pass of the same microbatch.
            graphs: Of the same forward pass; those that are used are taken out.
            wants_hidden: False if nobody needs the gradient of the span's input. Then blocks before the first
                one that the adapter changes are left out.
        """
        factor = _factor(gradient, self.blocks.dtype)
        gradient = gradient.to(self.device_of(batch.span.stop - 1))
        gradient = (gradient if factor == 1 else gradient.float() * factor).to(self.blocks.dtype)
        adapter = batch.adapter
        of_adapter = None if adapter is None else torch.zeros_like(adapter.values)
        least = batch.span.start
        if not wants_hidden:
            first = None if adapter is None else adapter.first_block(batch.span)
            least = batch.span.stop if first is None else first
        for block in reversed(range(least, batch.span.stop)):
            needs_hidden = wants_hidden or block > least
            graph = graphs.pop(block, None) if graphs else None
            if graph is None:
                part = _part(batch, block).with_gradients()
                with torch.enable_grad():
                    hidden = inputs[block - batch.span.start].detach().requires_grad_(needs_hidden)
                    output = self._run(batch, block, hidden, part)
            else:
                hidden, part, output = graph.hidden, graph.part, graph.output
            wanted = [*([hidden] if needs_hidden else []), *part.tensors()]
            gradients = list(torch.autograd.grad(output, wanted, gradient))
            if needs_hidden:
                gradient = gradients.pop(0)
            if adapter is not None and of_adapter is not None:
                for into, found in zip(adapter.of_block(block, of_adapter).tensors(), gradients, strict=True):
                    into.copy_(found)
            yield
        if factor != 1:
            gradient = gradient.float() / factor
            of_adapter = None if of_adapter is None else of_adapter / factor
        return Gradients(gradient if wants_hidden else None, of_adapter)

    def _run(self, batch: Microbatch, block: int, hidden: Tensor, part: BlockAdapter) -> Tensor:
        blocks = self._part_with(block)
        index, rows = block - blocks.span.start, batch.rows.to(blocks.device)
        return run_block(
            blocks.layers(index),
            blocks.architecture,
            blocks.windows[index],
            hidden.to(blocks.device),
            blocks.rotations(rows.positions)[block],
            rows,
            part.to(blocks.device),
            Dropout(batch.seed),
            stepwise=blocks.rounds_stepwise,
        )


def _free_bytes(card: torch.device) -> int:
    """Bytes that may be allocated on a GPU: what torch holds there and does not use is free as well."""
    unused = torch.cuda.memory_reserved(card) - torch.cuda.memory_allocated(card)
    return int(torch.cuda.mem_get_info(card)[0]) + unused


def _linears(layers: BlockLayers) -> Iterator[AnyLinear]:
    yield layers.qkv
    yield layers.output
    mlp = layers.mlp
    parts = [mlp] if isinstance(mlp, FeedForward) else [*mlp.experts, *([mlp.shared] if mlp.shared else [])]
    for part in parts:
        yield part.gate_up
        yield part.down
    if isinstance(mlp, ExpertMlp):
        yield mlp.router


def _factor(gradient: Tensor, dtype: torch.dtype) -> float:
    """Power of two that brings a gradient into the range of float16, whose least values it lies below."""
    if dtype is not torch.float16:
        return 1.0
    largest = float(gradient.abs().max()) if gradient.numel() else 0.0
    return 2.0 ** (_FLOAT16_LOG2 - math.frexp(largest)[1]) if largest else 1.0


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
