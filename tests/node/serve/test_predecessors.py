"""Who may feed a session, and when that ends."""

from __future__ import annotations

import trio
import trio.testing

from p2pinfer.node.serve.predecessors import Predecessors


def expected(predecessors: Predecessors) -> str:
    return "".join(peer for peer in "abcdef" if predecessors.expects(peer))


def test_whoever_was_named_last_takes_over_with_its_first_step() -> None:
    predecessors = Predecessors("a")
    predecessors.fed_by("a")
    predecessors.expect("b")
    predecessors.fed_by("a")
    assert expected(predecessors) == "ab"
    predecessors.fed_by("b")
    assert expected(predecessors) == "b"


def test_of_many_that_were_named_those_given_up_first_are_forgotten_and_never_who_feeds() -> None:
    predecessors = Predecessors("a")
    for peer in "bcd":
        predecessors.expect(peer)
    assert expected(predecessors) == "acd"
    predecessors.expect("c")  # once more, and last
    predecessors.expect("e")
    assert expected(predecessors) == "ace"


def test_a_former_feeder_that_is_named_again_takes_over_again() -> None:
    predecessors = Predecessors("a")
    predecessors.expect("b")
    predecessors.expect("a")
    predecessors.fed_by("a")
    assert expected(predecessors) == "a"


async def test_who_is_cut_off_is_read_from_no_more() -> None:
    predecessors = Predecessors("a")
    ended: list[str] = []

    async def feed(peer: str) -> None:
        with predecessors.feeding(peer):
            await trio.sleep_forever()
        ended.append(peer)

    async with trio.open_nursery() as nursery:
        predecessors.expect("b")
        for peer in "ab":
            nursery.start_soon(feed, peer)
        await trio.testing.wait_all_tasks_blocked()
        predecessors.fed_by("b")
        await trio.testing.wait_all_tasks_blocked()
        assert ended == ["a"]
        nursery.start_soon(feed, "b")  # which attaches anew
        await trio.testing.wait_all_tasks_blocked()
        assert ended == ["a", "b"]
        assert expected(predecessors) == "b"
        nursery.cancel_scope.cancel()
