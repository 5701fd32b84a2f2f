"""Fraud proofs as they are carried: who is told of them, from whom they are fetched, who looks at them."""

from __future__ import annotations

import pytest
import trio

from p2pinfer.node.swarm.proof_gossip import MAX_TOLD, Heard, Notice
from p2pinfer.reputation.receipt import digest_of

from .proof_board import Judge, Place, proof_against, until_told


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
