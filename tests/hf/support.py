"""Blocks that are here and do what a swarm's would, to test models of transformers without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from p2pinfer.hf import DistributedModelForCausalLM, DistributedModelForSequenceClassification
from p2pinfer.learning.swarm_trainer import Batch, Trace
from p2pinfer.learning.trained_adapter import AdapterGradient, ModelAdapter
from p2pinfer.loops.blocking import BlockingClient
from p2pinfer.models.checkpoint.checkpoint import open_checkpoint
from p2pinfer.models.compute.blocks import load_blocks
from p2pinfer.models.compute.target import Target
from p2pinfer.models.learning.adapter import Adapter
from p2pinfer.models.learning.rows import Rows as Positions
from p2pinfer.models.learning.span_passes import Forwarded, Microbatch, SpanPasses, complete
from p2pinfer.models.numerics import FLOAT32
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.train_tensors import decode_vector, layout_of


class Rows:
    """`BlockingRows` that computes all of each row."""

    def __init__(self, blocks: Blocks, adapter: ModelAdapter | None) -> None:
        self._blocks = blocks
        self._adapter = adapter

    def run(self, inputs: Sequence[Tensor], new: Sequence[int]) -> list[Tensor]:
        self._blocks.steps.append([len(each) for each in inputs])
        outputs: list[Tensor] = []
        for row, count in zip(inputs, new, strict=True):
            order = torch.arange(len(row))
            batch = Batch(Positions([len(row)], order, order), row)
            outputs.append(self._blocks.forward(batch, self._adapter, keeps=False).output[-count:])
        return outputs

    def close(self) -> None:
        return


class Blocks:
    """A `BlockingTrainer` over blocks of its own."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(folder, "mine")
        self.all = BlockSpan(0, checkpoint.spec.num_blocks)
        self.passes = SpanPasses(load_blocks(checkpoint, self.all, Target(torch.device("cpu"), FLOAT32)))
        self.adapters: list[ModelAdapter | None] = []  # of every forward pass
        self.steps: list[list[int]] = []  # lengths of the rows in every step of a generation
        self.kept: dict[int, tuple[Microbatch, Forwarded]] = {}

    def trainer(self) -> Blocks:
        return self

    def rows(self, adapter: ModelAdapter | None) -> Rows:
        return Rows(self, adapter)

    def close(self) -> None:
        return

    def forward(
        self,
        batch: Batch,
        adapter: ModelAdapter | None = None,
        *,
        span: BlockSpan | None = None,
        keeps: bool = True,
        seed: int = 0,
    ) -> Trace:
        self.adapters.append(adapter)
        part = None if adapter is None else adapter.part(self.all)
        applied = None
        if part is not None:
            layout = layout_of(part.updates, part.prompt_tokens)
            architecture = self.passes.blocks.architecture
            values = decode_vector(bytearray(part.payload), layout.size(architecture, self.all))
            applied = Adapter(layout, values, architecture, self.all)
        work = Microbatch(span or self.all, batch.rows, applied, seed)
        forwarded = complete(self.passes.forward(work, batch.hidden))
        trace = Trace(work.span, forwarded.output, adapter, [])
        if keeps:
            self.kept[id(trace)] = (work, forwarded)
        return trace

    def backward(
        self, trace: Trace, gradient: Tensor, *, wants_hidden: bool = True
    ) -> tuple[Tensor | None, AdapterGradient | None]:
        work, forwarded = self.kept[id(trace)]
        found = complete(self.passes.backward(work, forwarded.inputs, gradient, wants_hidden=wants_hidden))
        total = None if trace.adapter is None else trace.adapter.gradient()
        if total is not None and found.adapter is not None:
            total.add(self.all, found.adapter)
        return found.hidden, total


def distributed(folder: Path, **options: Any) -> Any:
    """A language model over blocks that are here."""
    blocks = cast(BlockingClient, Blocks(folder))
    return DistributedModelForCausalLM.from_pretrained(folder, swarm=blocks, dtype="float32", **options)


def classifier(folder: Path, **options: Any) -> Any:
    """A classifier over blocks that are here."""
    blocks = cast(BlockingClient, Blocks(folder))
    return DistributedModelForSequenceClassification.from_pretrained(
        folder, swarm=blocks, dtype="float32", **options
    )
