"""KV cache of all sessions of a span, in pages of preallocated pools.

A pool is a row of token slots, the same for every block, `page_tokens` slots to a page. A span that lies on
several devices has a pool on each (pool.py), and a page is the same slots in all of them. A lease holds
the pages for as many tokens as a session may ever have. It takes one contiguous run of pages where there is
one, because then attention reads its keys and values in place; otherwise it takes what is free, and they are
gathered. Pages at its end that were never written can be taken back for others, and replaced (`resize`).

A session may begin with the pages of another one that is over (`keep`, `fork`). Pages that only such ones
hold count as free: whoever needs room gets it, and they are gone. A page that several hold is never written;
a fork owns the page in which it goes on, or begins at the start of that page with one of its own.

On a CPU a pool is memory that was mapped and not touched: a page costs something when it is first written.
"""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Iterable, Sequence

import torch

from p2pinfer.errors import CacheFull

from .pool import PagePool


class CacheLease:
    """The pages of one session, until they are released.

    Attributes:
        length: Tokens cached; every block of the span holds keys and values for all of them.
        max_tokens: Tokens there is room for.
        own_from: The position from which on its pages are its own; what lies before others may read as well.
    """

    def __init__(self, cache: PagedCache, pages: Sequence[int], max_tokens: int) -> None:
        self.length = 0
        self.own_from = 0
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

    @property
    def pages(self) -> Sequence[int]:
        """Numbers of its pages, in order; another object whenever they change."""
        return self._pages

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

    def begin_at(self, position: int) -> None:
        """Go on from `position`, below `own_from`, with pages of its own from there on.

        Nothing of this session may be computed at the moment.

        Raises:
            CacheFull: There is no room, or no page begins at `position`; nothing was changed.
        """
        cache, pages = self._cache, self._pages
        first, offset = divmod(position, cache.page_tokens)
        if offset:
            raise CacheFull(f"a session that begins with another one has no page of its own at {position}")
        fresh = cache.take(len(pages) - first, after=pages[first - 1] if first else -1)
        cache.take_back(pages[first:])
        self._set_pages([*pages[:first], *fresh])
        self.own_from = position
        self.length = min(self.length, position)

    def keep(self, length: int) -> KeptPages:
        """The first `length` tokens, to stay when this lease is released, for as long as there is room."""
        return self._cache.keep(self._pages, min(length, self.length))

    def release(self) -> None:
        """Give the pages back; harmless a second time."""
        pages, self._pages = self._pages, ()
        self.length = self.max_tokens = 0
        self._cache.take_back(pages)


class KeptPages:
    """Pages of a session that is over. They stay until the room is needed.

    Attributes:
        length: Tokens whose keys and values are in them; 0 when they are gone.
    """

    def __init__(self, pages: Sequence[int], length: int) -> None:
        self.pages = pages
        self.length = length


class PagedCache:
    """Key and value pages for the blocks of a span, under one byte budget.

    Not for several threads at once, but for `free_tokens`.

    Attributes:
        pools: Where they lie, one for each device of the span, in the order of its blocks.
    """

    def __init__(
        self,
        *,
        layout: Sequence[tuple[torch.device, int]],
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        budget_bytes: int,
        page_tokens: int = 64,
    ) -> None:
        """A cache for so many blocks on each device of `layout`, in that order."""
        self.page_tokens = page_tokens
        num_blocks = sum(blocks for _, blocks in layout)
        self.bytes_per_token = num_blocks * 2 * kv_heads * head_dim * dtype.itemsize
        pages = max(0, budget_bytes // (page_tokens * self.bytes_per_token))
        self.capacity_tokens = pages * page_tokens
        self.budget_bytes = self.capacity_tokens * self.bytes_per_token
        self._free = [range(pages)] if pages else []  # runs of free pages, in order, none touching the next
        self._leases_of = _counts(pages)  # by page: how many leases hold it
        self._keepers_of = _counts(pages)  # and how many of those that are kept
        self._kept: dict[KeptPages, None] = {}  # those that were used last come last
        self._yielding = 0  # pages that none but kept ones hold
        self.pools = tuple(
            PagePool(
                num_blocks=blocks,
                kv_heads=kv_heads,
                head_dim=head_dim,
                capacity_tokens=self.capacity_tokens,
                page_tokens=page_tokens,
                dtype=dtype,
                device=device,
            )
            for device, blocks in layout
        )

    @property
    def free_tokens(self) -> int:
        """Number of tokens that can still be reserved, in whole pages; for them, kept pages go."""
        return (sum(map(len, self._free)) + self._yielding) * self.page_tokens

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
        if len(behind) < count:
            # For pages that follow each other, too: a session that runs comes before one that is over.
            while self._kept and not any(len(run) >= count for run in self._free):
                self.drop(next(iter(self._kept)))
            return self._hold(self._take(count))
        if count:
            self._shorten(behind, count)
        return self._hold(behind[:count])

    def take_back(self, pages: Sequence[int]) -> None:
        """Count a lease of these pages less; `CacheLease.release` calls this."""
        for page in pages:
            self._leases_of[page] -= 1
            self._yielding += not self._leases_of[page] and self._keepers_of[page] > 0
        self._add_free(page for page in pages if not self._leases_of[page] and not self._keepers_of[page])

    # ------------------------------------------------------------------ what outlives a session

    def keep(self, pages: Sequence[int], length: int) -> KeptPages:
        """Let `length` tokens in a lease's pages stay when it is released; `CacheLease.keep` calls this."""
        kept = KeptPages(pages[: -(-length // self.page_tokens)], length)
        for page in kept.pages:
            self._keepers_of[page] += 1
        self._kept[kept] = None
        return kept

    def fork(self, kept: KeptPages, length: int, max_tokens: int) -> CacheLease:
        """Pages for a session of up to `max_tokens` tokens that begins with the first ones of `kept`.

        The lease's `length` says with how many: `length`, or fewer where the page in which they end is used
        elsewhere. If it is not, the fork takes that page over, and what was kept ends before it: to copy it
        would leave the fork with pages that do not follow each other.

        Raises:
            CacheFull: There is no room for it; what was kept stays.
        """
        length = min(length, kept.length, max_tokens)
        whole, part = divmod(length, self.page_tokens)
        if part and (self._leases_of[kept.pages[whole]] or self._keepers_of[kept.pages[whole]] > 1):
            length, part = whole * self.page_tokens, 0
        shared = kept.pages[: whole + (part > 0)]
        for page in self._hold(shared):
            self._yielding -= self._leases_of[page] == 1
        try:
            # The pages that are let go of now are the very ones that a contiguous fork goes on with.
            if part:
                self._cut(kept, whole)
            count = -(-max_tokens // self.page_tokens) - len(shared)
            pages = [*shared, *self.take(count, max_tokens, after=shared[-1] if shared else -1)]
        except CacheFull:
            self.take_back(shared)
            raise
        if kept in self._kept:
            self._kept[kept] = self._kept.pop(kept)
        lease = CacheLease(self, pages, max_tokens)
        lease.length, lease.own_from = length, whole * self.page_tokens
        return lease

    def drop(self, kept: KeptPages) -> None:
        """Keep these pages no more; harmless a second time."""
        self._cut(kept, 0)

    def _cut(self, kept: KeptPages, count: int) -> None:
        """Keep the first `count` pages alone."""
        pages = kept.pages[count:]
        kept.pages = kept.pages[:count]
        kept.length = min(kept.length, count * self.page_tokens)
        for page in pages:
            self._keepers_of[page] -= 1
        gone = [page for page in pages if not self._keepers_of[page] and not self._leases_of[page]]
        self._yielding -= len(gone)
        self._add_free(gone)
        if not kept.pages:
            self._kept.pop(kept, None)

    def _hold(self, pages: Sequence[int]) -> Sequence[int]:
        for page in pages:
            self._leases_of[page] += 1
        return pages

    def _add_free(self, pages: Iterable[int]) -> None:
        for run in _runs(sorted(pages)):
            at = bisect.bisect(self._free, run.start, key=lambda free: free.start)
            if at < len(self._free) and self._free[at].start == run.stop:
                run = range(run.start, self._free.pop(at).stop)
            if at and self._free[at - 1].stop == run.start:
                at -= 1
                run = range(self._free.pop(at).start, run.stop)
            self._free.insert(at, run)

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


def _counts(pages: int) -> memoryview[int]:
    """(pages,) 16-bit zeros, in memory that is taken when it is first written, like the pool's."""
    return memoryview(mmap.mmap(-1, max(2 * pages, 1)))[: 2 * pages].cast("H")
