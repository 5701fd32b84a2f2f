"""Pages that outlive their session: who shares them, and that they yield."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from p2pinfer.errors import CacheFull
from p2pinfer.models.compute.cache import CacheLease, KeptPages, PagedCache

from .test_cache import make_cache, slots_of


def computed(cache: PagedCache, tokens: int, max_tokens: int) -> CacheLease:
    lease = cache.reserve(max_tokens)
    lease.length = tokens
    return lease


def test_a_fork_goes_on_in_a_row_behind_what_it_shares() -> None:
    cache = make_cache()
    lease = computed(cache, 10, 24)
    kept = lease.keep(10)
    lease.release()
    assert cache.free_tokens == 40
    fork = cache.fork(kept, 10, 20)
    assert (fork.length, fork.own_from, fork.start) == (10, 8, 0)
    assert slots_of(fork) == list(range(20))
    assert (kept.length, cache.free_tokens) == (8, 20)  # the page in which the fork writes is the fork's


def test_a_second_fork_has_a_page_of_its_own() -> None:
    cache = make_cache()
    lease = computed(cache, 10, 10)
    kept = lease.keep(10)
    lease.release()
    one, two = cache.fork(kept, 10, 12), cache.fork(kept, 10, 12)
    assert [each.length for each in (one, two)] == [10, 8]
    assert slots_of(one)[:8] == slots_of(two)[:8]
    assert {*slots_of(one)[8:]}.isdisjoint(slots_of(two)[8:])


def test_a_page_that_a_session_reads_is_not_taken_over() -> None:
    cache = make_cache()
    lease = computed(cache, 12, 12)
    kept = lease.keep(12)
    reader = cache.fork(kept, 12, 16)
    fork = cache.fork(kept, 10, 16)
    assert (reader.length, fork.length) == (12, 8)
    assert {*slots_of(fork)[8:]}.isdisjoint(slots_of(reader))


def test_whoever_needs_room_gets_it_and_the_oldest_go_first() -> None:
    cache = make_cache()
    kept: list[KeptPages] = []
    for _ in range(3):
        lease = computed(cache, 12, 12)
        kept.append(lease.keep(12))
        lease.release()
    assert cache.free_tokens == 40
    cache.reserve(16)
    assert [each.length for each in kept] == [0, 0, 12]
    cache.reserve(24)
    assert kept[2].length == 0
    with pytest.raises(CacheFull):
        cache.reserve(1)


def test_a_fork_that_does_not_fit_takes_nothing() -> None:
    cache = make_cache()
    lease = computed(cache, 8, 8)
    kept = lease.keep(8)
    lease.release()
    other = cache.reserve(28)
    with pytest.raises(CacheFull):
        cache.fork(kept, 8, 16)
    other.release()
    assert cache.free_tokens == 40
    assert cache.fork(kept, 8, 16).length == 8


def test_a_fork_that_begins_earlier_leaves_what_it_shared() -> None:
    cache = make_cache()
    lease = computed(cache, 12, 12)
    kept = lease.keep(12)
    lease.release()
    fork = cache.fork(kept, 12, 16)
    shared = slots_of(fork)[:12]
    with pytest.raises(CacheFull, match="at 6"):
        fork.begin_at(6)
    fork.begin_at(4)
    assert (fork.length, fork.own_from, kept.length) == (4, 4, 12)
    assert slots_of(fork)[:4] == shared[:4]
    assert {*slots_of(fork)[4:]}.isdisjoint(shared)


class Forks(RuleBasedStateMachine):
    """Sessions that come, are kept, forked and go: what one writes no other reads, and no page is lost."""

    leases = Bundle("leases")
    keeps = Bundle("keeps")

    def __init__(self) -> None:
        super().__init__()
        self.cache = make_cache()
        self.live: list[CacheLease] = []
        self.kept: list[KeptPages] = []

    @rule(target=leases, tokens=st.integers(1, 24), filled=st.integers(0, 24))
    def reserve(self, tokens: int, filled: int) -> CacheLease | None:
        try:
            lease = computed(self.cache, min(tokens, filled), tokens)
        except CacheFull:
            assert self.cache.free_tokens < -(-tokens // 4) * 4
            return None
        self.live.append(lease)
        return lease

    @rule(target=keeps, lease=leases)
    def keep(self, lease: CacheLease | None) -> KeptPages | None:
        if lease is None or lease not in self.live or not lease.length:
            return None
        kept = lease.keep(lease.length)
        self.release(lease)
        self.kept.append(kept)
        return kept

    @rule(target=leases, kept=keeps, length=st.integers(1, 24), more=st.integers(0, 12))
    def fork(self, kept: KeptPages | None, length: int, more: int) -> CacheLease | None:
        if kept is None or not kept.length:
            return None
        try:
            lease = self.cache.fork(kept, length, length + more)
        except CacheFull:
            return None
        assert lease.length <= length
        self.live.append(lease)
        return lease

    @rule(lease=leases, tokens=st.integers(1, 30))
    def resize(self, lease: CacheLease | None, tokens: int) -> None:
        if lease is not None and lease in self.live and tokens >= lease.length:
            try:
                lease.resize(tokens)
            except CacheFull:
                return

    @rule(lease=leases)
    def release(self, lease: CacheLease | None) -> None:
        if lease is not None and lease in self.live:
            lease.release()
            self.live.remove(lease)

    @rule(kept=keeps)
    def drop(self, kept: KeptPages | None) -> None:
        if kept is not None:
            self.cache.drop(kept)

    @invariant()
    def what_a_session_writes_nobody_else_reads(self) -> None:
        for lease in self.live:
            own = {slot // 4 for slot in slots_of(lease)[lease.own_from :]}
            others = [each for each in self.live if each is not lease]
            read = {slot // 4 for each in others for slot in slots_of(each)}
            assert own.isdisjoint(read)
            assert all(own.isdisjoint(each.pages) for each in self.kept)

    @invariant()
    def what_no_session_holds_is_free(self) -> None:
        held = {slot // 4 for lease in self.live for slot in slots_of(lease)}
        assert self.cache.free_tokens == self.cache.capacity_tokens - 4 * len(held)
        for each in self.kept:
            assert len(each.pages) == -(-each.length // 4)

    def teardown(self) -> None:
        for lease in self.live:
            lease.release()
        assert self.cache.free_tokens == self.cache.capacity_tokens
        assert self.cache.reserve(40).start == 0
        assert not any(each.length for each in self.kept)


TestForks = Forks.TestCase
TestForks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
