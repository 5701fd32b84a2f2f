"""Floods of notices, and wrong ones: they only delay a true fraud proof, and get what they are granted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio

from p2pinfer.errors import PeerError
from p2pinfer.node.concurrency.turn_queue import TurnQueue
from p2pinfer.node.evidence.proof_errands import RETRIES_S
from p2pinfer.node.evidence.store import EvidenceStore
from p2pinfer.node.swarm.proof_fetch import Holders
from p2pinfer.node.swarm.proof_gossip import MAX_BYTES, MAX_TOLD_OF_UNKNOWN, Heard, Notice, ProofCarrier
from p2pinfer.reputation.receipt import digest_of

from ...threads import do_without_threads
from .proof_board import BoardOf, Judge, Place, proof_against, until_told


def nothing(number: int, author: str, told_by: str = "") -> Heard:
    """A notice of a proof that nobody has."""
    return Heard(Notice("proof", "r", digest_of(b"%d" % number), f"own{number}"), author, told_by=told_by)


async def test_notices_of_nothing_do_not_hold_up_a_proof_that_is_there(
    place: Place, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """They took a worker each for half a minute, and the queue was theirs."""
    do_without_threads(monkeypatch)
    author, client = place.join("author"), place.join("client")
    judge = Judge(client)
    for number in range(200):
        client.hear(nothing(number, f"stranger{number}", told_by=f"neighbour{number % 3}"))
    began_at = trio.current_time()
    await author.publish(*proof_against("liar"))
    await judge.wait_for(1)
    assert judge.seen == ["liar"]
    assert trio.current_time() - began_at < sum(RETRIES_S)


async def test_a_neighbour_that_passes_on_much_takes_no_place_of_another(place: Place) -> None:
    client = place.join("client")
    taken = [client.hear(nothing(n, f"author{n}", told_by="busy")) for n in range(100)]
    assert 0 < taken.count(True) < 30
    assert client.hear(nothing(1000, "author", told_by="quiet"))


@pytest.mark.parametrize(
    "lie",
    [{"accused": "honest"}, {"revision": "other"}, {"size": 1 << 20, "tokens": 2, "blocks": 1}, {"size": 9}],
    ids=["about another", "of another model", "dearer", "smaller"],
)
async def test_who_tells_of_anothers_proof_first_and_wrongly_does_not_suppress_it(
    place: Place,
    lie: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The author's own notice was not looked at any more: not now, and not from a neighbour's table later."""
    do_without_threads(monkeypatch)
    author = place.join("author")
    address = await author.publish(*proof_against("liar"))
    client = place.join("client")
    judge = Judge(client)
    said: dict[str, Any] = {"kind": "proof", "revision": "r", "proof": address, "accused": "liar", **lie}
    assert client.hear(Heard(Notice(**said), "forger", told_by="author"))
    right = Heard(Notice("proof", "r", address, "liar"), "author", b"sealed")
    assert client.hear(right)
    assert not client.hear(right)
    await judge.wait_for(1)
    assert judge.seen == ["liar"]


async def test_many_wrong_notices_only_delay_a_proof(
    place: Place, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    do_without_threads(monkeypatch)
    monkeypatch.setattr("p2pinfer.node.evidence.proof_errands.RETRIES_S", (0.5,))
    author = place.join("author")
    address = await author.publish(*proof_against("liar"))
    client = place.join("client")
    judge = Judge(client)
    for number in range(9):
        client.hear(Heard(Notice("proof", "r", address, f"honest{number}"), f"forger{number}"))
    right = Heard(Notice("proof", "r", address, "liar"), "author", b"sealed")
    while not client.hear(right):  # as neighbours tell of it again and again
        await trio.sleep(1)
    await judge.wait_for(1)
    assert judge.seen == ["liar"]


@pytest.mark.parametrize("lie", [(2, 1), (1, 2), (0, 0)], ids=["tokens", "blocks", "none"])
async def test_who_says_less_than_a_proof_takes_is_not_heard_any_more(
    place: Place, lie: tuple[int, int]
) -> None:
    author, client = place.join("author"), place.join("client")
    judge = Judge(client)
    address = await author.publish(*proof_against("liar"))
    await judge.wait_for(1)
    other = place.join("other")
    looked_at = Judge(other)
    tokens, blocks = lie
    notice = Notice("proof", "r", address, "liar", size=1 << 20, tokens=tokens, blocks=blocks)
    other.hear(Heard(notice, "author", told_by="client"))
    with trio.fail_after(30):  # the proof is opened in a thread
        number = 1
        while other.hear(nothing(number, "author", told_by=f"neighbour{number}")):
            number += 1
            await trio.sleep(0.01)
    assert looked_at.seen == []
    assert other.hear(nothing(0, "another", told_by="client"))


async def test_a_proof_that_is_larger_than_its_notice_says_is_not_fetched(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pinfer.node.evidence.proof_errands.RETRIES_S", ())
    author, client = place.join("author"), place.join("client")
    address = await author.publish(*proof_against("liar"))
    await until_told(client)
    other = place.join("other")
    judge = Judge(other)
    other.hear(Heard(Notice("proof", "r", address, "liar", size=1000, tokens=1, blocks=1), "author"))
    right = Heard(Notice("proof", "r", address, "liar", size=1 << 20, tokens=1, blocks=1), "author")
    with trio.fail_after(30):
        while not other.hear(right):  # not before the first one was given up
            assert judge.seen == [] and other.store.held_bytes == 0
            await trio.sleep(0.01)
    await judge.wait_for(1)


def fetched_in_vain(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every proof take all bytes that one may, and not be there; the authors it was asked for."""
    asked: list[str] = []

    async def fetch(
        host: object,
        stores: object,
        holders: Holders,
        digests: object,
        most: int,
        note: Callable[[int], None],
    ) -> dict[bytes, bytes]:
        await trio.lowlevel.checkpoint()
        asked.append(holders.author)
        note(MAX_BYTES)
        raise PeerError("it is not all there", holders.author)

    monkeypatch.setattr("p2pinfer.node.swarm.proof_gossip.fetch_parts", fetch)
    return asked


async def test_an_author_is_granted_so_many_bytes_and_all_authors_so_many(
    place: Place, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr("p2pinfer.node.evidence.proof_errands.RETRIES_S", ())
    client = place.join("client")
    asked = fetched_in_vain(monkeypatch)
    for number in range(20):
        notice = Notice("proof", "r", digest_of(b"%d" % number), "own", size=MAX_BYTES)
        client.hear(Heard(notice, f"author{number // 2}", told_by=f"n{number}"))
        await trio.testing.wait_all_tasks_blocked()
    assert asked == ["author0", "author1", "author2", "author3"]


async def test_what_could_not_be_afforded_is_not_fetched_for_nothing_a_moment_later(
    place: Place, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    client = place.join("client")
    asked = fetched_in_vain(monkeypatch)
    for number in range(20):
        notice = Notice("proof", "r", digest_of(b"%d" % number), "own", size=MAX_BYTES)
        client.hear(Heard(notice, f"author{number}", told_by=f"n{number}"))
    await trio.sleep(sum(RETRIES_S) + 1)
    assert len(asked) == 4


async def test_notices_of_nothing_use_up_no_bytes(
    place: Place, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Four of them that say no size took all that there are for ten minutes."""
    do_without_threads(monkeypatch)
    monkeypatch.setattr("p2pinfer.node.evidence.proof_errands.RETRIES_S", ())
    author, client = place.join("author"), place.join("client")
    judge = Judge(client)
    for number in range(12):
        assert client.hear(nothing(number, f"stranger{number}", told_by=f"neighbour{number}"))
    await trio.sleep(1)
    await author.publish(*proof_against("liar"))
    await judge.wait_for(1)
    assert judge.seen == ["liar"]


async def test_proofs_about_peers_that_nobody_has_heard_of_push_out_no_others(place: Place) -> None:
    author = place.join("author")
    host = place.network.host("node")
    aside = EvidenceStore(1 << 20, 900, groups_at_least=1)
    node = ProofCarrier(
        host,
        EvidenceStore(1 << 20, 900, groups_at_least=2),
        BoardOf(place.board, "node"),
        is_known=lambda peer_id: peer_id == "liar",
        aside=aside,
    )
    place.network.nursery.start_soon(node.serve)
    place.board.carriers["node"] = node
    await author.publish(*proof_against("liar"))
    await until_told(node)
    for number in range(12):
        await author.publish(*proof_against(f"own{number}", b"%d" % number * 100_000))
        await trio.testing.wait_all_tasks_blocked()
    assert len(node.records()) <= 1 + MAX_TOLD_OF_UNKNOWN
    assert node.store.held_bytes < 400_000 < aside.held_bytes <= 1 << 20


async def test_a_proof_about_nobody_known_is_looked_at_once_the_peer_announces_itself(place: Place) -> None:
    """Throw-away keys accuse themselves for nothing, and a liar that comes back is known for one."""
    author = place.join("author")
    known, news = {"there"}, [trio.Event()]
    node = ProofCarrier(
        place.network.host("node"),
        EvidenceStore(1 << 24, 900, groups_at_least=2),
        BoardOf(place.board, "node"),
        is_known=known.__contains__,
        aside=EvidenceStore(1 << 24, 900, groups_at_least=1),
        news=lambda: news[0],
    )
    judge = Judge(node)
    place.network.nursery.start_soon(node.serve)
    place.board.carriers["node"] = node
    for name in ("away", "own", "there"):
        await author.publish(*proof_against(name))
    await judge.wait_for(1)
    with trio.fail_after(30):
        while len(node.records()) < 3:
            await trio.sleep(0.01)
    assert judge.seen == ["there"]
    known.add("away")
    was, news[0] = news[0], trio.Event()
    was.set()
    await judge.wait_for(2)
    assert judge.seen == ["there", "away"]
    assert len(node.records()) == 3


async def test_every_neighbour_has_its_turn_in_the_queue() -> None:
    queue = TurnQueue[int](max_of_one=3, max_bringers=2)
    assert [queue.put("busy", n) for n in range(5)] == [True, True, True, False, False]
    assert queue.put("quiet", 10) and not queue.put("third", 20)
    assert [await queue.get() for _ in range(4)] == [0, 10, 1, 2]
