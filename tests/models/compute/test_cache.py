from __future__ import annotations

from typing import Any

import psutil
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from p2pinfer.errors import CacheFull
from p2pinfer.models.compute.cache import CacheLease, PagedCache

CPU = torch.device("cpu")
BYTES_PER_TOKEN = 3 * 2 * 2 * 8 * 4


def make_cache(budget_bytes: int = 10 * 4 * BYTES_PER_TOKEN, **options: Any) -> PagedCache:
    """Ten pages of four tokens, unless told otherwise."""
    shape: dict[str, Any] = {"layout": [(CPU, 3)], "kv_heads": 2, "head_dim": 8, "dtype": torch.float32}
    return PagedCache(**shape, budget_bytes=budget_bytes, page_tokens=4, **options)


def slots_of(lease: CacheLease) -> list[int]:
    return list(lease.slots(0, lease.max_tokens))


def test_the_budget_is_one_for_all_blocks_in_whole_pages() -> None:
    cache = make_cache(10 * 4 * BYTES_PER_TOKEN + 4 * BYTES_PER_TOKEN - 1)
    assert (cache.capacity_tokens, cache.free_tokens) == (40, 40)
    assert cache.budget_bytes == 40 * BYTES_PER_TOKEN


def test_a_reservation_takes_whole_pages_in_a_row_and_gives_them_back() -> None:
    cache = make_cache()
    lease = cache.reserve(5)
    assert cache.free_tokens == 32
    assert lease.start == 0
    assert slots_of(lease) == [0, 1, 2, 3, 4]
    lease.release()
    assert cache.free_tokens == 40
    lease.release()
    assert cache.free_tokens == 40
    assert (lease.length, lease.max_tokens) == (0, 0)


def test_what_does_not_fit_is_refused_in_gibibytes_and_tokens() -> None:
    cache = make_cache()
    cache.reserve(30)
    with pytest.raises(CacheFull, match=r"0\.00 GiB \(8 tokens\) free of 0\.00 GiB \(40 tokens\)") as refusal:
        cache.reserve(9)
    assert "a session of 0.00 GiB (9 tokens) does not fit" in str(refusal.value)
    assert cache.free_tokens == 8
    with pytest.raises(CacheFull, match=r"0 tokens\) free"):
        make_cache(100).reserve(1)
    with pytest.raises(ValueError, match="cannot reserve 0 tokens"):
        cache.reserve(0)


def test_the_smallest_gap_that_fits_is_taken_and_pages_are_strewn_only_if_none_does() -> None:
    cache = make_cache()
    leases = [cache.reserve(tokens) for tokens in (4, 12, 4, 8, 12)]
    leases[1].release()  # pages 1-3
    leases[3].release()  # pages 5-6
    assert cache.reserve(8).start == 5 * 4
    leases[2].release()  # page 4, which joins 1-3
    assert cache.reserve(16).start == 1 * 4
    leases[0].release()
    leases[4].release()
    strewn = cache.reserve(16)
    assert strewn.start is None
    assert slots_of(strewn) == [0, 1, 2, 3, *range(28, 40)]


def test_rolling_back_forgets_and_cannot_go_forward() -> None:
    lease = make_cache().reserve(10)
    lease.length = 7
    lease.truncate(7)
    lease.truncate(2)
    assert lease.length == 2
    for position in (3, -1):
        with pytest.raises(ValueError, match=f"cannot roll back to {position}: 2 tokens are cached"):
            lease.truncate(position)


def test_what_is_written_is_seen_in_place_and_gathered_and_nowhere_else() -> None:
    cache = make_cache()
    for block in range(3):
        cache.pools[0].write(block, torch.arange(40), torch.zeros(40, 4, 8))
    heads = torch.arange(2 * 4 * 8, dtype=torch.float32).view(2, 4, 8)
    cache.pools[0].write(1, torch.tensor([9, 6]), heads)
    keys, values = cache.pools[0].view(6, 10)
    assert torch.equal(keys[1][0, :, 3], heads[0, :2])
    assert torch.equal(values[1][0, :, 0], heads[1, 2:])
    assert not keys[0].any()
    assert not values[2].any()
    assert keys[1][0].count_nonzero() + values[1][0].count_nonzero() == heads.count_nonzero()
    gathered = cache.pools[0].gather(1, torch.tensor([6, 9, cache.pools[0].null_slot]))
    assert torch.equal(gathered[:, 0, :, 1].flatten(0, 1), heads[0])
    assert torch.equal(gathered[:, 0, :, 0].flatten(0, 1), heads[1])
    assert not gathered[:, :, :, 2].any()


def test_a_lease_that_grows_again_goes_on_where_it_ended_if_that_is_free() -> None:
    cache = make_cache()
    lease, other = cache.reserve(12), cache.reserve(4)
    lease.resize(4)
    assert cache.free_tokens == 32
    lease.resize(9)
    assert (lease.start, slots_of(lease)) == (0, list(range(9)))
    lease.resize(16)
    assert lease.start is None
    assert slots_of(lease)[:12] == list(range(12))
    assert set(slots_of(lease)[12:]).isdisjoint(slots_of(other))
    with pytest.raises(CacheFull):
        lease.resize(37)
    assert lease.max_tokens == 16


def test_memory_is_taken_by_what_is_written_and_not_before() -> None:
    def resident() -> int:
        return int(psutil.Process().memory_info().rss)

    before = resident()
    cache = make_cache(2 << 30)
    lease = cache.reserve(1000)
    assert resident() - before < 4 << 20
    cache.pools[0].write(0, torch.tensor(lease.slots(0, 1000)), torch.ones(1000, 4, 8))
    assert resident() - before < 8 << 20


class Reservations(RuleBasedStateMachine):
    """Sessions that come and go: no slot has two owners, and none is ever lost."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.cache = make_cache()
        self.held: list[CacheLease] = []

    @rule(target=leases, tokens=st.integers(1, 24))
    def reserve(self, tokens: int) -> CacheLease | None:
        free = self.cache.free_tokens
        pages = -(-tokens // 4)
        try:
            lease = self.cache.reserve(tokens)
        except CacheFull:
            assert free < pages * 4
            assert self.cache.free_tokens == free
            return None
        assert self.cache.free_tokens == free - pages * 4
        self.held.append(lease)
        return lease

    @rule(lease=leases, tokens=st.integers(1, 30))
    def resize(self, lease: CacheLease | None, tokens: int) -> None:
        """What lies below the smaller of two sizes stays where it is."""
        if lease is None or lease.max_tokens == 0:
            return
        before = slots_of(lease)
        try:
            lease.resize(tokens)
        except CacheFull:
            assert slots_of(lease) == before
            return
        assert lease.max_tokens == tokens
        kept = min(tokens, len(before))
        assert slots_of(lease)[:kept] == before[:kept]

    @rule(lease=leases)
    def release(self, lease: CacheLease | None) -> None:
        if lease is not None:
            lease.release()
            self.held = [held for held in self.held if held is not lease]

    @invariant()
    def every_page_has_one_owner(self) -> None:
        pages = [slot // 4 for lease in self.held for slot in slots_of(lease)[::4]]
        assert len(pages) == len(set(pages))
        assert all(0 <= page < 10 for page in pages)
        assert len(pages) * 4 + self.cache.free_tokens == self.cache.capacity_tokens

    @invariant()
    def pages_in_a_row_are_known_to_be(self) -> None:
        for lease in self.held:
            slots = slots_of(lease)
            in_a_row = slots == list(range(slots[0], slots[0] + len(slots)))
            assert (lease.start == slots[0]) == in_a_row
            assert in_a_row or lease.start is None

    def teardown(self) -> None:
        for lease in self.held:
            lease.release()
        assert self.cache.free_tokens == self.cache.capacity_tokens
        assert self.cache.reserve(40).start == 0


TestReservations = Reservations.TestCase
TestReservations.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
