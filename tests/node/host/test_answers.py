"""Answers under a crowd of askers: who gets a turn, and who gets the bytes."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import repeat
from typing import cast

import pytest
import trio
import trio.testing

from p2pinfer.errors import ProtocolViolation
from p2pinfer.node.evidence.store import LIMITS
from p2pinfer.node.host.answers import PIECE_BYTES, Allowance, AnswerLimits, Answers
from p2pinfer.node.transport.peer_stream import PeerStream


class Asker:
    """A peer's stream, which takes in whatever it is sent."""

    def __init__(self, peer_id: str, address_range: str) -> None:
        self.peer_id = peer_id
        self.address_range = address_range
        self.received = 0

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_all(self, content: bytes) -> None:
        self.received += len(content)
        await trio.lowlevel.checkpoint()


def asker(peer_id: str, address_range: str) -> PeerStream:
    return cast(PeerStream, Asker(peer_id, address_range))


@pytest.mark.parametrize("ranges", [1, 4, 10, 20])
def test_a_crowd_that_asks_at_once_leaves_a_turn_for_who_comes_later(ranges: int) -> None:
    """Its peers hold as many answers as they are given, in each range and in all ranges together."""
    answers, held = Answers(LIMITS), 0
    with ExitStack() as turns:
        for number in range(400):
            try:
                turns.enter_context(answers.turn(asker(f"evil {number // 4}", f"range {number % ranges}")))
                held += 1
            except ProtocolViolation:
                continue
        assert held >= min(ranges, 4)
        with answers.turn(asker("honest", "elsewhere")):
            pass
    assert answers.turns == 0


def test_one_peer_of_a_range_leaves_turns_to_others_there() -> None:
    answers = Answers(AnswerLimits(Allowance(8, 1, 1.0), Allowance(8, 1, 1.0), Allowance(64, 1, 1.0)))
    with ExitStack() as turns:
        with pytest.raises(ProtocolViolation):
            for _ in range(9):
                turns.enter_context(answers.turn(asker("evil", "a range")))
        with answers.turn(asker("honest", "a range")):
            pass


async def test_bytes_that_all_share_are_given_to_address_ranges_in_turn(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Ten ranges ask for 100 MB each of a budget of 1 MB/s; an eleventh has its 1 MB after 11 s."""
    most = 200 << 20
    everybody = Allowance(64, PIECE_BYTES, 1 << 20)
    answers = Answers(AnswerLimits(Allowance(4, most, 1e9), Allowance(8, most, 1e9), everybody))

    async def take(peer_id: str, address_range: str, size: int) -> None:
        with answers.turn(asker(peer_id, address_range)) as answer:
            await answer.send(size, repeat(bytes(PIECE_BYTES), size // PIECE_BYTES))

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(take, f"evil {number}", f"range {number % 10}", most // 2)
        await trio.sleep(5)
        began_at = trio.current_time()
        await take("honest", "elsewhere", 1 << 20)
        assert trio.current_time() < began_at + 12
        nursery.cancel_scope.cancel()
