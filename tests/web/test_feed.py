"""Events that pages follow: what a newcomer hears first, and what becomes of one that is too slow."""

from __future__ import annotations

import trio

from p2pinfer.events import HopFailed, HopReplaced, HopTaken, SessionEnded, SessionStarted
from p2pinfer.web import feed as feed_module
from p2pinfer.web.feed import Feed

ROUTE = (HopTaken("a", (0, 4), "direct"), HopTaken("b", (4, 8), "relayed"))
BEGUN = SessionStarted("s1", ROUTE, 100)


async def test_every_page_hears_of_every_event() -> None:
    feed = Feed()
    with feed.follow() as one, feed.follow() as other:
        assert one is not None
        assert other is not None
        feed.report(BEGUN)
        assert [await one.events.receive(), await other.events.receive()] == [BEGUN, BEGUN]


async def test_a_page_that_comes_later_is_told_the_present_route_of_what_runs() -> None:
    feed = Feed()
    feed.report(BEGUN)
    feed.report(SessionStarted("s2", ROUTE, 7))
    feed.report(HopReplaced("s1", ("b",), (ROUTE[0], HopTaken("c", (4, 8), "direct")), "failure"))
    feed.report(SessionEnded("s2", "closed", 0))
    with feed.follow() as following:
        assert following is not None
        (begun,) = following.begun
    assert [hop.peer_id for hop in begun.route] == ["a", "c"]
    assert (begun.session, begun.max_tokens) == ("s1", 100)


async def test_a_page_that_does_not_read_is_let_go_and_the_others_are_not() -> None:
    feed = Feed()
    failure = HopFailed("s1", "a", "it hung up")
    with feed.follow() as slow, feed.follow() as quick:
        assert slow is not None
        assert quick is not None
        for _ in range(1000):
            feed.report(failure)
            assert await quick.events.receive() == failure
        heard = [event async for event in slow.events]
    assert 0 < len(heard) < 1000


async def test_so_many_pages_follow_and_no_more() -> None:
    feed = Feed()

    async def follow(task_status: trio.TaskStatus[bool]) -> None:
        with feed.follow() as following:
            task_status.started(following is not None)
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        taken = [await nursery.start(follow) for _ in range(feed_module.MAX_PAGES)]
        assert all(taken)
        with feed.follow() as one_too_many:
            assert one_too_many is None
        nursery.cancel_scope.cancel()
    with feed.follow() as following:
        assert following is not None
