"""Fraud proofs as they are carried: who is told of them, from whom they are fetched, who looks at them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial
from typing import Any

import pytest
import trio

from p2pinfer.errors import PeerError
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.concurrency.turn_queue import TurnQueue
from p2pinfer.node.evidence.proof_errands import RETRIES_S
from p2pinfer.node.evidence.store import EvidenceStore, serve_evidence
from p2pinfer.node.swarm.proof_fetch import Holders
from p2pinfer.node.swarm.proof_gossip import (
    MAX_BYTES,
    MAX_TOLD,
    MAX_TOLD_OF_UNKNOWN,
    Heard,
    Notice,
    ProofCarrier,
)
from p2pinfer.reputation.proof import Accusation, Proof
from p2pinfer.reputation.receipt import NO_RECEIPT, RECEIPT_VERSION, Payload, Receipt, digest_of, sign_receipt

from ..memory import MemoryNetwork, sign

INPUT, OUTPUT = b"in" * 50_000, b"out" * 50_000


def proof_against(peer_id: str, output: bytes = OUTPUT) -> tuple[Proof, dict[bytes, Payload]]:
    """A chain of one receipt, and the tensors that it names."""
    digests = digest_of(INPUT), digest_of(output)
    receipt = Receipt(
        RECEIPT_VERSION,
        b"s" * 16,
        0,
        NO_RECEIPT,
        "r",
        0,
        1,
        0,
        1,
        1,
        0,
        "bfloat16",
        "bfloat16",
        *digests,
        b"n" * 16,
    )
    signed = sign_receipt(receipt, partial(sign, peer_id))
    return Proof(1, peer_id, "output", (signed,)), dict(zip(digests, (INPUT, output), strict=True))


class Board:
    """Passes notices on to whoever is there when they are published."""

    def __init__(self) -> None:
        self.carriers: dict[str, ProofCarrier] = {}

    async def publish_notice(self, author: str, notice: Notice) -> bytes:
        await trio.lowlevel.checkpoint()
        for peer_id, carrier in self.carriers.items():
            if peer_id != author:
                carrier.hear(Heard(notice, author, b"sealed"))
        return b"sealed"


class BoardOf:
    """One author's end of the board."""

    def __init__(self, board: Board, author: str) -> None:
        self._board, self._author = board, author

    async def publish_notice(self, notice: Notice) -> bytes:
        return await self._board.publish_notice(self._author, notice)


class Place:
    """Hosts with carriers on one board."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork(nursery)
        self.board = Board()

    def join(self, peer_id: str) -> ProofCarrier:
        host = self.network.host(peer_id)
        carrier = ProofCarrier(host, EvidenceStore(1 << 26, 900), BoardOf(self.board, peer_id))
        serve_evidence(host, carrier.store)
        self.board.carriers[peer_id] = carrier
        self.network.nursery.start_soon(carrier.serve)
        return carrier


@pytest.fixture
async def place() -> AsyncGenerator[Place]:
    async with open_nursery() as nursery:
        with trio.fail_after(30):
            yield Place(nursery)


class Judge:
    """Notes what it is shown, and says what it is told to."""

    def __init__(self, carrier: ProofCarrier, says: bool | None = True) -> None:
        self.seen: list[str] = []
        self._says = says
        self._changed = trio.Event()
        carrier.attach(self.look, lambda heard: True)

    async def look(
        self, heard: Heard, accusation: Accusation, contents: Mapping[bytes, Payload]
    ) -> bool | None:
        await trio.lowlevel.checkpoint()
        assert set(contents) == set(accusation.contents)
        self.seen.append(accusation.peer_id)
        self._changed.set()
        self._changed = trio.Event()
        return self._says

    async def wait_for(self, count: int) -> None:
        while len(self.seen) < count:
            await self._changed.wait()


async def until_told(carrier: ProofCarrier) -> None:
    while not carrier.records():
        await trio.lowlevel.checkpoint()


async def test_whoever_published_may_leave_when_somebody_has_it_all(place: Place) -> None:
    author = place.join("author")
    address = await author.publish(*proof_against("liar"))
    with trio.move_on_after(0.01) as alone:
        await author.handed_out(address)
    assert alone.cancelled_caught
    node = place.join("node")
    node.hear(Heard(Notice("proof", "r", address, "liar"), "author", b"sealed"))
    await author.handed_out(address)
    await until_told(node)
    await place.network.kill("author")
    late = place.join("late")
    judge = Judge(late)
    late.hear(Heard(Notice("proof", "r", address, "liar"), "author", b"sealed", told_by="node"))
    await judge.wait_for(1)
    assert judge.seen == ["liar"]


async def test_what_came_before_anybody_looked_is_looked_at(place: Place) -> None:
    author, client = place.join("author"), place.join("client")
    await author.publish(*proof_against("liar"))
    await until_told(client)
    judge = Judge(client)
    await judge.wait_for(1)
    assert judge.seen == ["liar"]


async def test_who_is_not_interested_is_shown_nothing(place: Place) -> None:
    author, client = place.join("author"), place.join("client")
    await author.publish(*proof_against("liar"))
    await until_told(client)

    async def look(*_: object) -> bool:
        raise AssertionError("nobody asked")

    client.attach(look, lambda heard: False)
    await trio.testing.wait_all_tasks_blocked()
    assert not client.hear(Heard(Notice("proof", "r", bytes(32), "other"), "author"))


async def test_newcomers_are_not_told_of_what_proves_nothing(place: Place) -> None:
    author, client = place.join("author"), place.join("client")
    judge = Judge(client, says=False)
    await author.publish(*proof_against("honest"))
    await judge.wait_for(1)
    await trio.testing.wait_all_tasks_blocked()
    assert client.records() == []
    await author.publish(*proof_against("another"))  # by the same author, who is not heard any more
    await trio.testing.wait_all_tasks_blocked()
    assert judge.seen == ["honest"]


async def test_a_proof_that_could_not_be_had_may_be_brought_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pinfer.node.evidence.proof_errands.RETRIES_S", ())
    author, client = place.join("author"), place.join("client")
    judge = Judge(client)
    address = digest_of(b"nobody has this")
    notice = Notice("proof", "r", address, "liar")
    assert client.hear(Heard(notice, "author"))
    assert not client.hear(Heard(notice, "author"))  # it is under way
    await trio.testing.wait_all_tasks_blocked()
    assert judge.seen == []
    assert client.hear(Heard(notice, "author"))
    assert author.records() == []


async def test_records_are_of_what_is_still_here_and_of_the_model_asked_for(place: Place) -> None:
    author = place.join("author")
    for number in range(MAX_TOLD + 3):
        await author.publish(*proof_against("liar", b"%d" % number))
    assert len(author.records()) == len(author.records("r")) == MAX_TOLD
    assert author.records("another") == []
    author.store.forget_expired(trio.current_time() + 1000)
    assert author.records() == []


# ---------------------------------------------------------------------- floods


def nothing(number: int, author: str, told_by: str = "") -> Heard:
    """A notice of a proof that nobody has."""
    return Heard(Notice("proof", "r", digest_of(b"%d" % number), f"own{number}"), author, told_by=told_by)


async def test_notices_of_nothing_do_not_hold_up_a_proof_that_is_there(
    place: Place, autojump_clock: trio.testing.MockClock
) -> None:
    """They took a worker each for half a minute, and the queue was theirs."""
    autojump_clock.autojump_threshold = 0.2  # else it jumps to the end while a thread looks at signatures
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
    place: Place, lie: dict[str, Any], autojump_clock: trio.testing.MockClock
) -> None:
    """The author's own notice was not looked at any more: not now, and not from a neighbour's table later."""
    autojump_clock.autojump_threshold = 0.2  # else it jumps to the end while a thread looks at signatures
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
    autojump_clock.autojump_threshold = 0.2
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
    autojump_clock.autojump_threshold = 0.2
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
