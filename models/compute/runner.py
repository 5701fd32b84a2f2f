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
from p2pinfer.models.progress import Progress
from p2pinfer.models.span import BlockSpan

from .attention import PackedAttention, Piece
from .blocks import Blocks, load_blocks
from .cache import CacheLease, PagedCache
from .paged_decode import PagedDecoder
from .routing import ExpertChoice
from .target import choose_target
from .updates import RowUpdates, SpanUpdates


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
        span: The blocks that it runs.
        dtype: What it computes in and returns.
        numerics: What its weights are stored as and what it computes in, as announcements and receipts say.
        device: Where.
        cache: Where sessions reserve.
    """

    def __init__(self, blocks: Blocks, cache: PagedCache, decoder: PagedDecoder | None = None) -> None:
        """A runner; steps of one token a session go to `decoder` where it accepts them."""
        self.spec = blocks.spec
        self.span = blocks.span
        self.dtype = blocks.dtype
        self.numerics = blocks.numerics
        self.device = blocks.device
        self.cache = cache
        self._blocks = blocks
        self._decoder = decoder
        self._num_threads = torch.get_num_threads()
        self._thread: int | None = None

    def stepwise(self) -> SpanRunner:
        """A runner of the same weights that shares this one's cache, and rounds as `Blocks.stepwise` does."""
        return SpanRunner(self._blocks.stepwise(), self.cache)

    def choosing(self, choice: ExpertChoice) -> SpanRunner:
        """A runner of the same weights that shares this one's cache, and leaves experts to `choice`."""
        return SpanRunner(self._blocks.choosing(choice), self.cache)

    @property
    def blocks(self) -> Blocks:
        """The blocks that it runs, for passes that need no cache."""
        return self._blocks

    @property
    def has_experts(self) -> bool:
        """True if its blocks choose among experts."""
        return self._blocks.architecture.family.experts is not None

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
            pieces: list[Piece] = []
            parts: list[Tensor] = []
            for chunk in chunks:
                pieces.append(Piece(chunk.lease, chunk.position, len(chunk.hidden)))
                parts.append(chunk.hidden.to("cpu", self.dtype))
            hidden = torch.cat(parts).to(self.device)
            updates: RowUpdates | None = None
            if any(chunk.updates is not None for chunk in chunks):
                rows = [(len(chunk.hidden), chunk.updates) for chunk in chunks]
                updates = RowUpdates(rows, self.device)
            part = self.span if span is None else span
            output = self._forward(pieces, hidden, part, updates).cpu()
        for lease, end in ends.items():
            lease.length = end
        return list(torch.split(output, [piece.tokens for piece in pieces])) if len(pieces) > 1 else [output]

    def _forward(
        self, pieces: Sequence[Piece], hidden: Tensor, span: BlockSpan, updates: RowUpdates | None
    ) -> Tensor:
        # Only the whole span is recorded: a client chooses the part, and each recording holds memory.
        decoder = self._decoder if updates is None else None
        if decoder is not None and span == self.span and decoder.accepts(pieces):
            return decoder.run(pieces, hidden, span)
        blocks = self._blocks
        attention = PackedAttention(
            blocks.architecture, blocks.windows, self.cache, pieces, blocks.rounds_stepwise
        )
        return blocks.forward(hidden, attention, span, updates)

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
    checkpoint: Checkpoint, span: BlockSpan, config: ComputeConfig, *, progress: Progress | None = None
) -> SpanRunner:
    """Load a span and give it a cache, as `config` says.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ConfigError: The config asks for what this machine has not.
        SpanOutOfRange: The model has no such blocks.
    """
    target = choose_target(config, checkpoint.spec.dtype)
    # Torch counts the cores that it is bound to, and knows nothing of a share of their time.
    torch.set_num_threads(config.threads or min(torch.get_num_threads(), usable_cores()))
    blocks = load_blocks(checkpoint, span, target, progress=progress)
    cache = PagedCache(
        num_blocks=len(span),
        kv_heads=blocks.architecture.kv_heads,
        head_dim=blocks.architecture.head_dim,
        dtype=target.dtype,
        device=target.device,
        budget_bytes=config.cache_bytes or target.cache_budget(),
        page_tokens=config.page_tokens,
    )
    # A CPU launches kernels for nothing, and would gather keys and values that it can read in place.
    decoder = PagedDecoder(blocks, cache) if target.device.type == "cuda" else None
    return SpanRunner(blocks, cache, decoder)
