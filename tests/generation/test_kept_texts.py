"""Which of the texts that hops keep another one begins with."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import trio
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.generation.kept_texts import LEAST_TOKENS, MAX_TEXTS, KeptTexts, common_length
from p2pinfer.node.protocol.messages import Opened
from p2pinfer.routing.route import Route
from p2pinfer.session.chain import ReplaySource
from p2pinfer.session.session import Session
from p2pinfer.session.terms import KeptSession

PAST = cast(ReplaySource, None)


@dataclass
class Terms:
    session: bytes
    codec: str = "float32"
    packed: int = 0


@dataclass
class Chain:
    terms: Terms
    prefix: int = 0
    hops = (SimpleNamespace(opened=Opened("float32", keeps_s=100)),)


class Ended:
    """A session that is over, on hops that keep it for 100 s."""

    repair = handovers = SimpleNamespace(done=0)
    route = Route(())

    def __init__(self, name: bytes, prefix: int = 0) -> None:
        self.chain = Chain(Terms(name), prefix)


class Opener:
    """Opens sessions behind those that it is asked for, unless it has nothing."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, int]] = []
        self.has_nothing = False

    async def open(self, kept: KeptSession, *_: object) -> Session | None:
        await trio.lowlevel.checkpoint()
        self.asked.append((kept.session, kept.tokens))
        return None if self.has_nothing else cast(Session, Ended(b"new", kept.tokens))


@given(st.lists(st.integers(0, 1), max_size=40), st.lists(st.integers(0, 1), max_size=40))
def test_the_common_beginning_is_that_of_a_search_id_by_id(one: list[int], other: list[int]) -> None:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    assert common_length(one, other) == count


async def open_for(texts: KeptTexts, ids: list[int]) -> Session | None:
    return await texts.open(ids, 1000, frozenset(), PAST)


async def test_the_longest_beginning_is_taken_and_one_token_is_left_to_compute() -> None:
    opener = Opener()
    texts = KeptTexts(opener.open)
    for name, ids in ((b"a", range(100)), (b"b", range(200)), (b"c", [1, 2, 3] * 100)):
        texts.note([*ids], cast(Session, Ended(name)))
    assert await open_for(texts, [*range(150), 7, 8]) is not None
    assert await open_for(texts, [*range(90)]) is not None
    assert await open_for(texts, [*range(LEAST_TOKENS)]) is None
    assert await open_for(texts, [5, *range(100)]) is None
    assert opener.asked == [(b"b", 150), (b"b", 89)]


async def test_what_hops_have_no_more_is_not_asked_for_again() -> None:
    opener = Opener()
    texts = KeptTexts(opener.open)
    texts.note([*range(100)], cast(Session, Ended(b"a")))
    texts.note([*range(90)], cast(Session, Ended(b"b")))
    opener.has_nothing = True
    for _ in range(3):
        assert await open_for(texts, [*range(120)]) is None
    assert [name for name, _ in opener.asked] == [b"a", b"b"]


async def test_texts_are_forgotten_in_time_and_the_oldest_where_there_are_too_many(
    autojump_clock: trio.testing.MockClock,
) -> None:
    opener = Opener()
    texts = KeptTexts(opener.open)
    texts.note([7] * 100, cast(Session, Ended(b"first")))
    await trio.sleep(60)
    for number in range(MAX_TEXTS - 1):
        texts.note([number] * 65, cast(Session, Ended(b"others")))
    assert await open_for(texts, [7] * 90) is not None
    assert opener.asked.pop() == (b"first", 89)
    await trio.sleep(60)  # for which hops keep no cache
    assert await open_for(texts, [7] * 90) is not None
    assert opener.asked.pop() == (b"others", 65)
    texts.note([8] * 100, cast(Session, Ended(b"last")))
    texts.note([8] * 100, cast(Session, Ended(b"last")))
    assert await open_for(texts, [0] * 90) is None
