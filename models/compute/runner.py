"""Runner of a span: packed batches in, hidden states out, every session's cache extended."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.machine.cores import usable_cores
from p2pinfer.models.machine.split import split_span
from p2pinfer.models.progress import Progress
from p2pinfer.models.span import BlockSpan

from .attention import Piece
from .blocks import Blocks, load_blocks
from .cache import CacheLease, PagedCache
from .mlp import ExpertChoice
from .stage import Row, Stage, run_stages
from .target import cache_budget, choose_targets
from .updates import SpanUpdates


class Chunk(NamedTuple):
    """Adjacent tokens of one session, to be run."""

    lease: CacheLease
    position: int  # of the first one; below the lease's length it rolls the session back
    hidden: Tensor  # (tokens, hidden_size), any float dtype, any device
    updates: SpanUpdates | None = None  # the session's adapter


class SpanRunner:
    """The blocks of a span and their cache. Belongs to one thread at a time.

    Attributes:
        spec: The model.
        architecture: Shape of its blocks.
        span: The blocks that it runs.
        dtype: What it computes in and returns.
        numerics: What its weights are stored as and what it computes in, as announcements and receipts say.
        devices: Where, in the order of the blocks.
        cache: Where sessions reserve.
        stages: Parts of the span, one on each device.
    """

    def __init__(
        self, stages: Sequence[Stage], cache: PagedCache, updates: SpanUpdates | None = None
    ) -> None:
        """A runner of stages that follow each other; `updates` are of all chunks that come with none."""
        first = stages[0].blocks
        self.spec = first.spec
        self.architecture = first.architecture
        self.span = first.span if len(stages) == 1 else BlockSpan(first.span.start, stages[-1].span.stop)
        self.dtype = first.dtype
        self.numerics = first.numerics
        self.devices = tuple(stage.device for stage in stages)
        self.cache = cache
        self.stages = stages
        self._updates = updates
        self._num_threads = torch.get_num_threads()
        self._thread: int | None = None

    def stepwise(self) -> SpanRunner:
        """A runner of the same weights that shares this one's cache, and rounds as `Blocks.stepwise` does."""
        return self._with_blocks([blocks.stepwise() for blocks in self.parts])

    def choosing(self, choice: ExpertChoice) -> SpanRunner:
        """A runner of the same weights that shares this one's cache, and leaves experts to `choice`."""
        return self._with_blocks([blocks.choosing(choice) for blocks in self.parts])

    def adapted(self, updates: SpanUpdates) -> SpanRunner:
        """A runner of the same weights that shares this one's cache, and has an adapter."""
        return SpanRunner(self.stages, self.cache, updates)

    def _with_blocks(self, parts: Sequence[Blocks]) -> SpanRunner:
        stages = [stage.with_blocks(blocks) for stage, blocks in zip(self.stages, parts, strict=True)]
        return SpanRunner(stages, self.cache, self._updates)

    @property
    def parts(self) -> Sequence[Blocks]:
        """The blocks that it runs, device by device, for passes that need no cache."""
        return [stage.blocks for stage in self.stages]

    @property
    def where(self) -> str:
        """Devices and the blocks on each, in words: `cuda:0 (0:40), cuda:1 (40:80)`."""
        if len(self.stages) == 1:
            return str(self.devices[0])
        return ", ".join(f"{stage.device} ({stage.span})" for stage in self.stages)

    @property
    def has_experts(self) -> bool:
        """True if its blocks choose among experts."""
        return self.architecture.family.experts is not None

    def run(self, chunks: Sequence[Chunk], span: BlockSpan | None = None) -> list[Tensor]:
        """Run the span over all chunks as one batch, and extend their sessions by them.

        With `span`, only that part of the span is run: a session's route may use fewer blocks than there are.

        Several chunks of one session may come together if each begins where the one before ended.

        Returns:
            One (tokens, hidden_size) for each chunk, on the CPU, in the runner's dtype.

        Raises:
            ValueError: A chunk leaves a gap, exceeds what its session reserved, or has the wrong shape.
                Nothing was done. Should anything else go wrong, no session grew, and those that were to be
                rolled back are.
        """
        assert span is None or self.span.covers(span), f"{span} is not among {self.span}"
        if not chunks:
            return []
        ends = self._check(chunks)
        self.claim_thread()
        for chunk in chunks:
            chunk.lease.truncate(min(chunk.position, chunk.lease.length))
        with torch.inference_mode():
            rows: list[Row] = []
            parts: list[Tensor] = []
            for chunk in chunks:
                piece = Piece(chunk.lease, chunk.position, len(chunk.hidden))
                rows.append(Row(piece, chunk.updates or self._updates))
                parts.append(chunk.hidden.to("cpu", self.dtype))
            part = self.span if span is None else span
            output = run_stages(self.stages, rows, torch.cat(parts), part).cpu()
        for lease, end in ends.items():
            lease.length = end
        return list(torch.split(output, [len(each) for each in parts])) if len(parts) > 1 else [output]

    def _check(self, chunks: Sequence[Chunk]) -> dict[CacheLease, int]:
        """Length that every lease will have."""
        ends: dict[CacheLease, int] = {}
        for chunk in chunks:
            lease, position = chunk.lease, chunk.position
            if chunk.hidden.shape != (len(chunk.hidden), self.spec.hidden_size) or not len(chunk.hidden):
                raise ValueError(f"hidden states of shape {tuple(chunk.hidden.shape)} cannot be run")
            if lease in ends and position != ends[lease]:
                raise ValueError(f"chunks of one session meet at {position} and {ends[lease]}")
            if not 0 <= position <= ends.get(lease, lease.length):
                raise ValueError(f"cannot go on at {position}: {lease.length} tokens are cached")
            ends[lease] = position + len(chunk.hidden)
            if ends[lease] > lease.max_tokens:
                raise ValueError(f"{ends[lease]} tokens exceed the {lease.max_tokens} that were reserved")
        return ends

    @property
    def threads(self) -> int:
        """Number of CPU threads that it computes with."""
        return self._num_threads

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads of a CPU from the next batch on. For the thread that runs batches."""
        self._num_threads = threads
        self._thread = None

    def claim_thread(self) -> None:
        """Give this thread the thread count that torch was set to.

        OpenMP keeps the count by thread, torch sets it only where it is asked, and oneDNN takes what it
        finds: in a worker thread it would use every core whatever torch.get_num_threads says (2.13).
        """
        if self._thread != threading.get_ident():
            self._thread = threading.get_ident()
            torch.set_num_threads(self._num_threads)


def open_runner(
    checkpoint: Checkpoint,
    span: BlockSpan,
    config: ComputeConfig,
    *,
    progress: Progress | None = None,
    laid_out: bool = False,
) -> SpanRunner:
    """Load a span and give it a cache, as `config` says.

    Args:
        laid_out: Hold quantised weights as what they stand for, in the dtype of the computation.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ConfigError: The config asks for what this machine has not.
        SpanOutOfRange: The model has no such blocks.
    """
    targets = choose_targets(config, checkpoint.spec.dtype, laid_out=laid_out)
    block_bytes = checkpoint.spec.block_bytes(targets[0].numerics)
    spans = split_span(span, [target.device for target in targets], block_bytes)
    split = [(target, part) for target, part in zip(targets, spans, strict=True) if part is not None]
    # Torch counts the cores that it is bound to, and knows nothing of a share of their time.
    torch.set_num_threads(config.threads or min(torch.get_num_threads(), usable_cores()))
    parts = [load_blocks(checkpoint, part, target, progress=progress) for target, part in split]
    shape = parts[0].architecture
    slot_bytes = 2 * shape.kv_heads * shape.head_dim * parts[0].dtype.itemsize
    cache = PagedCache(
        layout=[(target.device, len(part)) for target, part in split],
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=parts[0].dtype,
        budget_bytes=config.cache_bytes
        or cache_budget([(target, len(part)) for target, part in split], slot_bytes),
        page_tokens=config.page_tokens,
    )
    stages = [Stage(blocks, pool) for blocks, pool in zip(parts, cache.pools, strict=True)]
    # A CPU launches kernels for nothing, and would gather keys and values that it can read in place.
    return SpanRunner([stage.recorded() if stage.device.type == "cuda" else stage for stage in stages], cache)
