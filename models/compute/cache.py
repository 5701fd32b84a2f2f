"""KV cache of all sessions of a span, in pages of one preallocated pool.

The pool is a row of token slots, the same for every block, `page_tokens` slots to a page. A lease holds
the pages for as many tokens as a session may ever have. It takes one contiguous run of pages where there is
one, because then attention reads its keys and values in place; otherwise it takes what is free, and they are
gathered. Pages at its end that were never written can be taken back for others, and replaced (`resize`).

On a CPU the pool is memory that was mapped and not touched: a page costs something when it is first
written. Slots are innermost but for the head's dimension, so that the keys of one head lie one after the
other: attention is 10-25 % faster than with the heads of one token side by side (1024 x 16 shape).

One slot beyond the last page, `null_slot`, is zero for ever: what pads a gather points there, and never at
what another session left behind.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

from p2pinfer.errors import CacheFull


class CacheLease:
    """The pages of one session, until they are released.

    Attributes:
        length: Tokens cached; every block of the span holds keys and values for all of them.
        max_tokens: Tokens there is room for.
    """

    def __init__(self, cache: PagedCache, pages: Sequence[int], max_tokens: int) -> None:
        self.length = 0
        self.max_tokens = max_tokens
        self._cache = cache
        self._set_pages(pages)

    def _set_pages(self, pages: Sequence[int]) -> None:
        # The other thread may look between the two. What it computes lies below the former `max_tokens`, and
        # there both the old and the new numbers say the same.
        self._pages = pages
        self._start = pages[0] * self._cache.page_tokens if len(_runs(pages)) == 1 else None

    @property
    def start(self) -> int | None:
        """The slot of the first token if all tokens follow each other in the pool, or None."""
        return self._start

    def slots(self, start: int, stop: int) -> Sequence[int]:
        """The slots of tokens `start` to `stop - 1`."""
        first, pages = self._start, self._pages  # `resize` may come in between
        if first is not None:
            return range(first + start, first + stop)
        size = self._cache.page_tokens
        return [pages[token // size] * size + token % size for token in range(start, stop)]

    def page_table(self, length: int) -> Sequence[int]:
        """The first `length` pages, in order; where there are fewer, page 0 stands in."""
        pages = self._pages[:length]
        return [*pages, *[0] * (length - len(pages))]

    def truncate(self, position: int) -> None:
        """Forget every token from `position` on. Nothing is moved or cleared.

        Raises:
            ValueError: There are fewer tokens than that.
        """
        if not 0 <= position <= self.length:
            raise ValueError(f"cannot roll back to {position}: {self.length} tokens are cached")
        self.length = position

    def resize(self, max_tokens: int) -> None:
        """Have room for so many tokens from now on: the last pages are given back, or more are added.

        The thread that computes may be using the cache meanwhile, below `max_tokens`.

        Raises:
            CacheFull: There is no room; nothing was changed.
        """
        cache, pages = self._cache, self._pages
        count = -(-max_tokens // cache.page_tokens)
        if count < len(pages):
            self._set_pages(pages[:count])
            cache.take_back(pages[count:])
        elif count > len(pages):
            self._set_pages([*pages, *cache.take(count - len(pages), after=pages[-1] if pages else -1)])
        self.max_tokens = max_tokens

    def release(self) -> None:
        """Give the pages back; harmless a second time."""
        pages, self._pages = self._pages, ()
        self.length = self.max_tokens = 0
        self._cache.take_back(pages)


class PagedCache:
    """A pool of key and value pages for `num_blocks` blocks, under one byte budget.

    Not for several threads at once, but for `free_tokens`.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        budget_bytes: int,
        page_tokens: int = 64,
    ) -> None:
        self.num_blocks = num_blocks
        self.page_tokens = page_tokens
        self.device = device
        self.dtype = dtype
        self.bytes_per_token = num_blocks * 2 * kv_heads * head_dim * dtype.itemsize
        pages = max(0, budget_bytes // (page_tokens * self.bytes_per_token))
        self.capacity_tokens = pages * page_tokens
        self.budget_bytes = self.capacity_tokens * self.bytes_per_token
        self.null_slot = self.capacity_tokens
        self._free = [range(pages)] if pages else []  # runs of free pages, in order, none touching the next
        shape = (num_blocks, 2, kv_heads, self.capacity_tokens + 1, head_dim)
        self._pool = torch.empty(shape, dtype=dtype, device=device)
        self._pool[:, :, :, self.null_slot] = 0
        self._blocks = self._pool.flatten(1, 2).unbind(0)  # each (2 * kv_heads, slots, head_dim)

    @property
    def free_tokens(self) -> int:
        """Number of tokens that can still be reserved, in whole pages."""
        return sum(map(len, self._free)) * self.page_tokens

    def reserve(self, max_tokens: int) -> CacheLease:
        """Pages for a session of up to `max_tokens` tokens.

        Raises:
            CacheFull: There is no room for it, or never will be.
        """
        if max_tokens < 1:
            raise ValueError(f"cannot reserve {max_tokens} tokens")
        return CacheLease(self, self.take(-(-max_tokens // self.page_tokens), max_tokens), max_tokens)

    def whole_pages(self, tokens: int) -> int:
        """Number of tokens that the pages for `tokens` have room for."""
        return -(-tokens // self.page_tokens) * self.page_tokens

    def take(self, count: int, max_tokens: int = 0, *, after: int = -1) -> Sequence[int]:
        """Free pages, for a lease of `max_tokens`; those behind page `after` if they are free.

        Raises:
            CacheFull: There are fewer.
        """
        if count * self.page_tokens > self.free_tokens:
            raise CacheFull(self._describe_shortage(max_tokens or count * self.page_tokens))
        behind = next((run for run in self._free if run.start == after + 1 and after >= 0), range(0))
        if len(behind) >= count:
            self._shorten(behind, count)
            return behind[:count]
        return self._take(count)

    def take_back(self, pages: Sequence[int]) -> None:
        """Add pages to the free ones; `CacheLease.release` calls this."""
        for run in _runs(sorted(pages)):
            at = bisect.bisect(self._free, run.start, key=lambda free: free.start)
            if at < len(self._free) and self._free[at].start == run.stop:
                run = range(run.start, self._free.pop(at).stop)
            if at and self._free[at - 1].stop == run.start:
                at -= 1
                run = range(self._free.pop(at).start, run.stop)
            self._free.insert(at, run)

    def write(self, block: int, slots: Tensor, heads: Tensor) -> None:
        """Put the keys and values of one block's tokens into their slots.

        Args:
            block: Index within the span.
            slots: (tokens,), on the pool's device.
            heads: (tokens, 2 * kv_heads, head_dim), the keys' heads before the values'.
        """
        self._blocks[block].index_copy_(1, slots, heads.transpose(0, 1))

    def view(self, start: int, stop: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Keys and values of adjacent slots in place, each by block: (1, kv_heads, slots, head_dim)."""
        part = self._pool[:, :, None, :, start:stop]
        return part[:, 0].unbind(0), part[:, 1].unbind(0)

    def gather(self, block: int, slots: Tensor) -> Tensor:
        """A copy of one block's keys and values in any slots, (2, 1, kv_heads, slots, head_dim)."""
        _, kv_heads, _, head_dim = self._pool.shape[1:]
        copy = self._blocks[block].index_select(1, slots)
        return copy.view(2, 1, kv_heads, len(slots), head_dim)

    def _take(self, count: int) -> Sequence[int]:
        """Free pages: the smallest run that holds them all, or else the largest runs until it is enough."""
        fitting = [run for run in self._free if len(run) >= count]
        if fitting:
            run = min(fitting, key=len)
            self._shorten(run, count)
            return run[:count]
        pages: list[int] = []
        for run in sorted(self._free, key=len, reverse=True):
            part = run[: count - len(pages)]
            self._shorten(run, len(part))
            pages.extend(part)
            if len(pages) == count:
                break
        return sorted(pages)

    def _shorten(self, run: range, count: int) -> None:
        at = self._free.index(run)
        self._free[at : at + 1] = [run[count:]] if len(run) > count else []

    def _describe_shortage(self, max_tokens: int) -> str:
        def size(tokens: int) -> str:
            return f"{tokens * self.bytes_per_token / 2**30:.2f} GiB ({tokens} tokens)"

        return (
            f"the KV cache has {size(self.free_tokens)} free of {size(self.capacity_tokens)}, "
            f"and a session of {size(max_tokens)} does not fit"
        )


def _runs(pages: Sequence[int]) -> list[range]:
    """Sorted page numbers as runs of adjacent ones."""
    runs: list[range] = []
    for page in pages:
        if runs and runs[-1].stop == page:
            runs[-1] = range(runs[-1].start, page + 1)
        else:
            runs.append(range(page, page + 1))
    return runs
