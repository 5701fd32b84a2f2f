"""Decode step of several sessions on a GPU, replayed as a CUDA graph over fixed buffers.

On a GPU the step of a span is hundreds of small kernels, and launching them one by one takes longer than
running them. So they are recorded once, as a CUDA graph, and replayed: for that nothing may depend on
Python or on the host, and every buffer keeps its address. Which sessions take part and how long they are
is therefore data: page tables and positions, from which the recorded kernels compute what to gather.

Sizes are rounded up, batches and contexts to powers of two, and a step is recorded when its size first
occurs. Rows that pad a batch repeat its last one, so what they write is what is there. Keys that pad a
context are the cache's null slot and masked: nothing of another session is ever read.

Nothing here needs CUDA but the recording; on a CPU the tests run the very same function unrecorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from operator import is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.models.span import BlockSpan

from .architecture import Architecture
from .attention import Piece
from .blocks import Blocks
from .pool import PagePool
from .scores import attend_by_scores, extras_of

logger = logging.getLogger(__name__)

_MAX_BATCH = 32
_MIN_CONTEXT = 256
# One H200, 8 key heads, microseconds for 4,096 keys, gathering left out: 84 whole and 31 in 16 parts for one
# session, 87 and 57 in 8 parts for four, 90 and 147 in 2 parts for sixteen; for 1,024 keys 26 and 22 at best.
_LONG_CONTEXT = 2048  # from which on its parts are worth the kernels that put them together
_FEW_HEADS = 32  # of all sequences, up to which they are
_SIDE_BY_SIDE = 256  # heads of parts that occupy a large GPU
_MIN_PART = 256
_TOLERANCE = 2e-2  # of a value near 1, in the narrowest dtype
# Keys and values that a block gathers at once; beyond this, packed attention reads them in place.
_MAX_GATHERED_BYTES = 1 << 30


class PagedDecoder:
    """Decode steps of a span, recorded by size.

    Attributes:
        attends_in_parts: Whether long contexts are cut, which was tried on the device.
    """

    def __init__(self, blocks: Blocks, pool: PagePool) -> None:
        self._blocks = blocks
        self._pool = pool
        self._steps: dict[tuple[BlockSpan, int, int], _Step] = {}
        self._place = _Place.on(pool.device) if pool.device.type == "cuda" else None
        with torch.inference_mode():
            self.attends_in_parts = parts_agree(blocks.architecture, blocks.dtype, pool.device)
        if not self.attends_in_parts:
            logger.warning("attention in parts is wrong on %s; long contexts take longer", pool.device)

    def accepts(self, pieces: Sequence[Piece]) -> bool:
        """True if these are one token each of a few sessions, and there are no experts to be routed to."""
        if self._blocks.architecture.family.experts or len(pieces) > _MAX_BATCH:
            return False
        batch, context = _sizes(pieces)
        gathered = batch * context * self._pool.slot_bytes
        sessions = {piece.lease for piece in pieces}
        return len(sessions) == sum(piece.tokens for piece in pieces) and gathered <= _MAX_GATHERED_BYTES

    def prepare(self, pieces: Sequence[Piece], span: BlockSpan) -> Callable[[Tensor], Tensor]:
        """A step through `span`, of which the device knows all but the hidden states.

        It takes and returns (tokens, hidden_size); the next step overwrites what it returns, and may be
        prepared when this one has been launched.
        """
        size = (span, *_sizes(pieces))
        step = self._steps.get(size)
        if step is None:
            step = self._steps[size] = _Step(
                self._blocks, self._pool, *size, self._place, self.attends_in_parts
            )
        step.place(pieces)
        return step.run


class _Place(NamedTuple):
    """Place of the recordings of one device, which share it: only one of them runs at a time.

    The stream is of this device, where torch would take that of the device that recorded first; and it is one
    stream, since libraries keep memory for each.
    """

    memory: Any
    stream: Any

    @classmethod
    def on(cls, device: torch.device) -> _Place:  # pragma: no cover -- needs a GPU
        cuda: Any = torch.cuda
        return cls(cuda.graph_pool_handle(), cuda.Stream(device))


class _Step:
    """A decode step of one size."""

    def __init__(
        self,
        blocks: Blocks,
        pool: PagePool,
        span: BlockSpan,
        batch: int,
        context: int,
        place: _Place | None,
        in_parts: bool,
    ) -> None:
        self._blocks = blocks
        self._pool = pool
        self._span = span
        self._context = context
        self._recorded_in = place
        self._in_parts = in_parts
        device, pages = pool.device, -(-context // pool.page_tokens)
        self._hidden = torch.zeros(batch, blocks.spec.hidden_size, dtype=blocks.dtype, device=device)
        self._positions = torch.zeros(batch, dtype=torch.long, device=device)
        self._pages = torch.zeros(batch, pages, dtype=torch.long, device=device)
        self._tokens = 0  # of the step that was placed
        self._runs: list[Sequence[int]] = []  # the leases' pages when the device was told them
        self._recording: tuple[Any, Tensor] | None = None  # a CUDA graph, and where its output will be

    def place(self, pieces: Sequence[Piece]) -> None:
        """Tell the device which tokens the next step is of."""
        self._tokens = len(pieces)
        rows = [*pieces, *[pieces[-1]] * (len(self._hidden) - len(pieces))]
        # Of the same lease the pages may be others since the last step, and then they are another sequence.
        runs = [row.lease.pages for row in rows]
        if len(runs) != len(self._runs) or any(map(is_not, runs, self._runs)):
            tables = [row.lease.page_table(self._pages.shape[1]) for row in rows]
            self._pages.copy_(torch.tensor(tables))
            self._runs = runs
        self._positions.copy_(torch.tensor([row.position for row in rows]))

    def run(self, hidden: Tensor) -> Tensor:
        """The step, (tokens, hidden_size) from any device to this one."""
        self._hidden[: self._tokens] = hidden
        if self._tokens < len(self._hidden):
            self._hidden[self._tokens :] = self._hidden[self._tokens - 1]
        output = self._compute() if self._recorded_in is None else self._replay(self._recorded_in)
        return output[: self._tokens]

    def _compute(self) -> Tensor:
        attention = _PagedAttention(
            self._blocks, self._pool, self._pages, self._positions, self._context, self._in_parts
        )
        return self._blocks.forward(self._hidden, attention, self._span)

    def _replay(self, place: _Place) -> Tensor:  # pragma: no cover -- needs a GPU
        if self._recording is None:
            self._recording = self._record(place)
        graph, output = self._recording
        graph.replay()
        return output

    def _record(self, place: _Place) -> tuple[Any, Tensor]:  # pragma: no cover -- needs a GPU
        cuda: Any = torch.cuda
        stream = place.stream
        with cuda.device(self._pool.device):
            graph = cuda.CUDAGraph()
            stream.wait_stream(cuda.current_stream())
            with cuda.stream(stream):
                self._compute()  # what libraries allocate on first use must not be recorded
            cuda.current_stream().wait_stream(stream)
            # Another thread may use a card meanwhile; in the mode that forbids it, both would fail.
            with cuda.graph(graph, pool=place.memory, stream=stream, capture_error_mode="thread_local"):
                output = self._compute()
        return graph, output


class _PagedAttention:
    """The attention of one token per row, all rows at once."""

    def __init__(
        self,
        blocks: Blocks,
        pool: PagePool,
        pages: Tensor,
        positions: Tensor,
        context: int,
        in_parts: bool,
    ) -> None:
        self._in_parts = in_parts
        self._architecture = blocks.architecture
        self._windows = blocks.windows
        self._pool = pool
        self.positions = positions
        size = pool.page_tokens
        token = torch.arange(context, device=pool.device)
        slots = pages[:, token // size] * size + token % size  # (batch, context)
        self._slots = slots.gather(1, positions[:, None])[:, 0]
        distance = positions[:, None] - token
        self._masks = {window: _mask(distance, window, pool.dtype) for window in set(self._windows)}
        self._seen_slots = torch.where(distance >= 0, slots, pool.null_slot).flatten()

    def attend(self, block: int, queries: Tensor, keys_values: Tensor, sinks: Tensor | None = None) -> Tensor:
        """See `Attention`."""
        shape, batch = self._architecture, len(queries)
        self._pool.write(block, self._slots, keys_values)
        gathered = self._pool.gather(block, self._seen_slots)[
            :, 0
        ]  # (2, kv_heads, batch * context, head_dim)
        split = gathered.view(2, shape.kv_heads, batch, -1, shape.head_dim).transpose(1, 2)
        keys, values = split[0], split[1]  # (batch, kv_heads, context, head_dim)
        rows = queries.view(batch, shape.kv_heads, -1, shape.head_dim)
        mask = self._masks[self._windows[block]].expand(-1, -1, rows.shape[2], -1)
        extras = extras_of(shape, sinks, 0, keys.shape[2], keys.device)
        parts = _parts(batch * shape.kv_heads, keys.shape[2]) if self._in_parts else 1
        if extras.are_none and parts > 1:
            output = attend_in_parts(rows, keys, values, mask, shape.attention_scale, parts)
        elif extras.are_none:
            output = functional.scaled_dot_product_attention(
                rows, keys, values, attn_mask=mask, scale=shape.attention_scale
            )
        else:
            output = attend_by_scores(rows, keys, values, mask, shape.attention_scale, extras)
        return output.reshape(batch, -1)


def attend_in_parts(
    rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, parts: int
) -> Tensor:
    """Attention whose keys are cut in parts, attended to side by side (Flash-Decoding, T. Dao et al., 2023).

    A kernel gives each sequence and head one multiprocessor: of one long sequence that leaves most of a GPU
    without work. A part's outputs count by the sum of its exponentials, which the kernel gives as well.

    Args:
        rows: (batch, kv_heads, group, head_dim).
        keys: (batch, kv_heads, context, head_dim), as are the values.
        mask: What broadcasts to (batch, 1, group, context), added to the scores; finite.
    """
    batch, heads, group, size = rows.shape

    def cut(each: Tensor) -> Tensor:
        """Parts of a context beside each other in the batch; a view where a sequence follows the other."""
        return (
            each.view(batch, heads, parts, -1, size).transpose(1, 2).reshape(batch * parts, heads, -1, size)
        )

    side_by_side = rows[:, None].expand(-1, parts, -1, -1, -1).reshape(batch * parts, heads, group, size)
    of_parts = mask[:, 0, 0].reshape(batch * parts, 1, 1, -1)
    outputs, sums = _attend_with_sums(
        side_by_side, cut(keys), cut(values), of_parts.expand(-1, heads, group, -1), scale
    )
    shares = sums[:, :, :group].reshape(batch, parts, heads, group, 1).softmax(1)
    return (outputs.reshape(batch, parts, heads, group, size) * shares).sum(1).to(rows.dtype)


def _attend_with_sums(
    rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs, and the logarithm of the sum of exponentials: (batch, kv_heads, group or more) float32."""
    operators: Any = torch.ops.aten  # those behind SDPA, which keeps the sums to itself
    if rows.device.type == "cuda":  # pragma: no cover -- needs a GPU
        found = operators._scaled_dot_product_efficient_attention(rows, keys, values, mask, True, scale=scale)
    else:
        attend = operators._scaled_dot_product_flash_attention_for_cpu
        found = attend(rows, keys, values, attn_mask=mask, scale=scale)
    return found[0], found[1]


def parts_agree(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> bool:
    """True if attention in parts is attention on this device, most of whose keys are hidden.

    The operators that give the sums are no public ones, and kernels differ from card to card.
    """
    group, size = architecture.heads // architecture.kv_heads, architecture.head_dim
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, architecture.kv_heads, group, size, generator=generator)
    both = torch.randn(2, 1, architecture.kv_heads, 2048, size, generator=generator)
    mask = torch.zeros(1, 1, 1, 2048)
    mask[..., 700:] = torch.finfo(dtype).min / 2
    rows, both, mask = (each.to(device, dtype) for each in (rows, both, mask))
    scale = size**-0.5
    whole = functional.scaled_dot_product_attention(rows, both[0], both[1], attn_mask=mask, scale=scale)
    try:
        found = attend_in_parts(rows, both[0], both[1], mask, scale, 8)
    except (AttributeError, RuntimeError, TypeError):  # another torch, or a card that the kernel is not for
        return False
    return bool((found.float() - whole.float()).abs().max() <= _TOLERANCE)


def _parts(heads: int, context: int) -> int:
    """Number of parts, a power of two, in which the keys of so many heads occupy a GPU."""
    if context < _LONG_CONTEXT or heads > _FEW_HEADS:
        return 1
    most = min(_SIDE_BY_SIDE // heads, context // _MIN_PART)
    return 1 << max(most.bit_length() - 1, 0)


def _mask(distance: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """(batch, 1, 1, context), from how far back each key lies."""
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    # Not -inf: a part of the keys may be hidden as a whole, and a softmax over nothing is none.
    hidden = torch.finfo(dtype).min / 2
    zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return zeros.masked_fill_(~seen, hidden)[:, None, None]


def _sizes(pieces: Sequence[Piece]) -> tuple[int, int]:
    """The powers of two, batch and context, that hold these pieces."""
    longest = max(piece.position for piece in pieces) + 1
    return 1 << (len(pieces) - 1).bit_length(), max(_MIN_CONTEXT, 1 << (longest - 1).bit_length())
