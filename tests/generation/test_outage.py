"""How long a generation waits, on a clock that jumps."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pinfer.errors import NoRoute, NotAdmitted, PeerError, PeerRefused, PeerVanished
from p2pinfer.generation.outage import LAST_PAUSE_S, OTHERS_S, Outage, RetryLimits, Waiting

GAP = NoRoute("nobody serves blocks 5:8", [(5, 8)])


async def wait_out(outage: Outage, told: list[Waiting]) -> list[float]:
    """When it looked again, until it gave up."""
    looked: list[float] = []
    while await outage.pause(GAP, trio.Event(), told.append):
        looked.append(trio.current_time())
    return looked


async def test_it_looks_ever_more_slowly_until_its_time_is_up(autojump_clock: trio.testing.MockClock) -> None:
    told: list[Waiting] = []
    began = trio.current_time()
    looked = await wait_out(Outage(RetryLimits(wait_s=20.0), begun=True), told)
    gaps = [after - before for before, after in zip([began, *looked], looked, strict=False)]
    assert gaps[:4] == pytest.approx([0.25, 0.5, 1.0, 2.0])
    assert max(gaps) <= LAST_PAUSE_S
    assert looked[-1] - began == pytest.approx(20.0)
    assert told == [Waiting(str(GAP), ((5, 8),), 20.0)]


async def test_news_end_a_pause(autojump_clock: trio.testing.MockClock) -> None:
    outage, changed = Outage(RetryLimits(wait_s=20.0), begun=True), trio.Event()
    changed.set()
    began = trio.current_time()
    assert await outage.pause(GAP, changed, lambda _: None)
    assert trio.current_time() == began


async def test_before_a_text_has_begun_it_is_shorter_and_silent(
    autojump_clock: trio.testing.MockClock,
) -> None:
    told: list[Waiting] = []
    began = trio.current_time()
    await wait_out(Outage(RetryLimits(find_s=2.0, wait_s=20.0), begun=False), told)
    assert trio.current_time() - began == pytest.approx(2.0)
    assert told == []


@pytest.mark.parametrize(
    ("failures", "waited_s"),
    [
        ([PeerRefused("another model", "a", "wrong_model")], OTHERS_S),
        ([PeerRefused("not on the list", "a", "not_admitted"), NotAdmitted("another swarm", "b")], OTHERS_S),
        ([NotAdmitted("another swarm", "a"), PeerVanished("gone", "b")], 20.0),
        ([PeerRefused("full", "a", "busy")], 20.0),
    ],
)
async def test_a_refusal_that_lasts_is_not_waited_for_before_a_text_has_begun(
    failures: list[PeerError], waited_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    for begun in (False, True):
        outage = Outage(RetryLimits(find_s=20.0, wait_s=20.0), begun=begun)
        for failure in failures:
            outage.note(failure)
        began = trio.current_time()
        await wait_out(outage, [])
        assert trio.current_time() - began == pytest.approx(20.0 if begun else waited_s)


async def test_every_reason_is_told_once_with_what_failed_last(
    autojump_clock: trio.testing.MockClock,
) -> None:
    told: list[Waiting] = []
    outage = Outage(RetryLimits(wait_s=20.0), begun=True)
    outage.note(PeerVanished("gone", "a"))
    for error in (GAP, GAP, NoRoute("all are full"), PeerVanished("it broke", "b")):
        assert await outage.pause(error, trio.Event(), told.append)
    assert [(each.reason, each.missing) for each in told] == [
        ("nobody serves blocks 5:8; the last one failed: gone", ((5, 8),)),
        ("all are full; the last one failed: gone", ()),
        ("it broke", ()),
    ]


async def test_whom_each_attempt_tried_last_is_no_new_reason(autojump_clock: trio.testing.MockClock) -> None:
    told: list[Waiting] = []
    outage = Outage(RetryLimits(wait_s=20.0), begun=True)
    for last in ("again in 2 s", "again in 4 s", "refused"):
        error = NoRoute(f"nobody serves 5:8; last tried: {last}", reason="nobody serves 5:8")
        assert await outage.pause(error, trio.Event(), told.append)
    assert [each.reason for each in told] == ["nobody serves 5:8; last tried: again in 2 s"]


async def test_a_round_is_so_many_routes_and_one_pardon(autojump_clock: trio.testing.MockClock) -> None:
    outage = Outage(RetryLimits(wait_s=20.0, max_attempts=2), begun=True)
    assert outage.take_forgiveness()
    assert not outage.take_forgiveness()
    outage.note(PeerVanished("gone"))
    assert outage.may_try_on
    outage.note(PeerVanished("gone"))
    assert not outage.may_try_on
    assert await outage.pause(GAP, trio.Event(), lambda _: None)
    assert outage.may_try_on
    assert not outage.take_forgiveness()  # all are forgiven with the pause
