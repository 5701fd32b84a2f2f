"""Who is left out of a generation's next route after a hop complained of its neighbour."""

from __future__ import annotations

from typing import Any, cast

from p2pinfer.errors import PeerError, PeerVanished, WrongOutput
from p2pinfer.generation.remote_blocks import RemoteBlocks


def remote_blocks() -> RemoteBlocks:
    """With no session open, which is all that is needed to abandon a route."""
    nothing = cast(Any, None)
    return RemoteBlocks(nothing, nothing, nothing)


async def excluded_after(*errors: PeerError) -> frozenset[str]:
    remote = remote_blocks()
    for error in errors:
        await remote.abandon(error)
    return remote.excluded


async def test_the_first_complaint_is_believed() -> None:
    assert await excluded_after(WrongOutput("not finite", "a", told_by="liar")) == {"a"}
    again = WrongOutput("not finite", "a", told_by="liar")
    assert await excluded_after(again, again) == {"a"}


async def test_who_complains_of_a_second_neighbour_is_left_out_and_both_are_not() -> None:
    errors = [WrongOutput("not finite", each, told_by="liar") for each in ("a", "b")]
    assert await excluded_after(*errors) == {"liar"}


async def test_what_was_seen_here_is_not_taken_back() -> None:
    errors = [
        PeerVanished("it shows no sign of life", "dead"),
        *(WrongOutput("not finite", each, told_by="liar") for each in ("a", "b")),
    ]
    assert await excluded_after(*errors) == {"dead", "liar"}


async def test_complaints_are_forgotten_with_the_rest() -> None:
    remote = remote_blocks()
    await remote.abandon(WrongOutput("not finite", "a", told_by="hop"))
    remote.forgive()
    await remote.abandon(WrongOutput("not finite", "b", told_by="hop"))
    assert remote.excluded == {"b"}
