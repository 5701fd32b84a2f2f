"""The client's check of every receipt: over real hops, and against receipts that are not in order."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import pytest
import torch

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import Equivocation, PeerError, PeerRefused, ProtocolViolation
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.sampling_config import LogitsRules, SamplingConfig
from p2pinfer.node.protocol.draws import Draws, draw_of, encode_draws, encode_ids, sign_draws
from p2pinfer.node.protocol.messages import SESSION_PROTOCOL, Bill, Step
from p2pinfer.node.serve.receipt_signer import ReceiptSigner
from p2pinfer.reputation.receipt import decode_receipt, digest_of, sign_receipt
from p2pinfer.routing.route import Hop, Route
from p2pinfer.session.hosting import open_session, start_session
from p2pinfer.session.receipt_checks import CHECK_EVERY, ReceiptBook
from p2pinfer.session.session import Session

from ..node.memory import sign, verify
from ..node.memory_swarm import MemorySwarm, open_memory_swarm, route_over
from .receipt_chain import (
    BREAKS_A,
    BREAKS_B,
    HOPS,
    JUNK_FOR_B,
    REVISION,
    SESSION,
    Chain,
    Tamper,
    book,
    changed,
    resigned,
    without,
)


@pytest.mark.parametrize("dtype", ["int2_bfloat16", "bfloat16_float32", "no_such_dtype"])
async def test_a_hop_whose_receipts_name_what_no_audit_can_run_again_is_to_blame(dtype: str) -> None:
    ours = book()
    ours.unchecked.append(await Chain().passed(resigned(1, dtype=dtype), 1))
    with pytest.raises(ProtocolViolation, match="cannot be checked") as caught:
        await ours.check()
    assert caught.value.peer_id == "b"


@pytest.mark.parametrize("announced", ["bfloat16", "int8_float32"])
async def test_a_hop_that_signs_for_other_numerics_than_it_has_announced_is_to_blame(announced: str) -> None:
    """Or it would be judged by what it signs, and chosen by what it announces."""
    hops = tuple(replace(hop, dtype=announced if hop.peer_id == "b" else "float32") for hop in HOPS)
    ours = book()
    ours.unchecked.append(await Chain(*hops).passed())
    with pytest.raises(ProtocolViolation, match=f"in float32, where {announced} was announced") as caught:
        await ours.check()
    assert caught.value.peer_id == "b"


async def test_honest_receipts_pass_and_are_kept_only_if_asked() -> None:
    for keep in (False, True):
        ours, chain = book(keep=keep), Chain()
        ours.unchecked += [await chain.passed() for _ in range(CHECK_EVERY)]
        await ours.check()
        assert len(ours.kept) == keep * CHECK_EVERY
        await ours.check()


async def test_what_hops_worked_is_added_up_and_is_no_more_than_the_time_that_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("p2pinfer.session.receipt_checks.time.monotonic", lambda: now[0])
    ours, chain = book(), Chain()
    # 9 ms in the queue; of 8 ms of a batch of four tokens a quarter; 1 ms of all else.
    bill = Bill(queue_us=9000, compute_us=8000, serve_us=18_000, batch_tokens=4)
    for number in range(CHECK_EVERY):
        is_time = ours.add(await chain.passed(), (bill, bill, Bill(0, 0, 0, 0)))
        assert is_time == (number == CHECK_EVERY - 1)
    now[0] = 101.0
    assert ours.work_s == pytest.approx(CHECK_EVERY * 2 * 0.003)
    ours.add(await chain.passed(), (Bill(0, 1 << 50, 1 << 50, 1),))
    assert ours.work_s == 1.0
    await ours.check()


@pytest.mark.parametrize(
    ("tamper", "blamed", "complaint"),
    [
        (resigned(1, returned=0), "b", "another step"),
        (resigned(1, dtype="bfloat16"), "b", "two chains"),
        (resigned(2, epoch=1), "c", "another step"),
        (resigned(2, session=b"t" * 16), "c", "another step"),
        (resigned(2, revision="q" * 32), "c", "another session"),
        (resigned(0, input=bytes(32)), "a", "do not link"),
        (resigned(1, input=bytes(32)), "b", "do not link"),
        (resigned(1, received=bytes(32)), "c", "do not name each other"),  # an honest hop refuses those
        (resigned(0, position=7), "b", "another step"),
        (resigned(1, tokens=2), "c", "another step"),
        (resigned(1, output=bytes(32)), "c", "do not link"),
        (resigned(2, output=bytes(32)), "c", "do not link"),
    ],
)
async def test_what_a_hop_signs_speaks_against_it_or_against_who_takes_it_in(
    tamper: Tamper, blamed: str, complaint: str
) -> None:
    ours, chain = book(), Chain()
    ours.unchecked.append(await chain.passed())
    ours.unchecked.append(await chain.passed(tamper, tamper.at))
    with pytest.raises(ProtocolViolation, match=complaint) as caught:
        await ours.check()
    assert (caught.value.peer_id, caught.value.told_by) == (blamed, "")


@pytest.mark.parametrize(
    ("tamper", "at"),
    [
        (without(0), 2),
        (without(0), 1),
        (without(1), 2),
        (without(2), 2),
        (without(0, 1), 2),
        (without(0, 1, 2), 2),
        (changed(lambda receipts: [*receipts, receipts[-1]]), 2),
        (changed(lambda receipts: [receipts[1], receipts[0], receipts[2]]), 2),
        (JUNK_FOR_B, 2),
        (JUNK_FOR_B, 1),
        (BREAKS_A, 2),
        (BREAKS_A, 1),
        (BREAKS_B, 2),
        (changed(lambda receipts: [*receipts[:2], receipts[2][:-1] + b"?"]), 2),
    ],
)
async def test_receipts_that_do_not_name_each_other_are_the_work_of_the_last_hop(
    tamper: Tamper, at: int
) -> None:
    """Whoever spoilt or dropped one: an honest last hop would have refused the step."""
    ours = book()
    ours.unchecked.append(await Chain().passed(tamper, at))
    with pytest.raises(ProtocolViolation) as caught:
        await ours.check()
    assert (caught.value.peer_id, caught.value.told_by) == ("c", "")


@pytest.mark.parametrize(
    ("tamper", "at", "blamed", "told_by"),
    [
        (BREAKS_A, 0, "a", "b"),  # b signed for these bytes: a gave them, or b made them
        (BREAKS_B, 1, "b", "c"),
        (changed(lambda _: []), 0, "b", ""),  # it signed for having been given none
        (changed(lambda _: []), 1, "c", ""),
    ],
)
async def test_what_two_neighbours_agree_on_is_between_the_two(
    tamper: Tamper, at: int, blamed: str, told_by: str
) -> None:
    ours = book()
    ours.unchecked.append(await Chain().passed(tamper, at))
    with pytest.raises(ProtocolViolation) as caught:
        await ours.check()
    assert (caught.value.peer_id, caught.value.told_by) == (blamed, told_by)


@pytest.mark.parametrize("lies", [{}, {"position": 7}, {"output": bytes(32)}])
async def test_who_makes_up_the_receipts_of_all_before_it_harms_none_but_its_neighbour(
    lies: dict[str, Any],
) -> None:
    """The last of three hops could else have the first two charged, and go free."""

    def make_up(receipts: list[bytes]) -> list[bytes]:
        first = sign_receipt(msgspec.structs.replace(decode_receipt(receipts[0]), **lies), partial(sign, "c"))
        second = msgspec.structs.replace(decode_receipt(receipts[1]), received=digest_of(first))
        return [first, sign_receipt(second, partial(sign, "c"))]

    ours = book()
    ours.unchecked.append(await Chain().passed(make_up, at=1))
    with pytest.raises(ProtocolViolation) as caught:
        await ours.check()
    assert (caught.value.peer_id, caught.value.told_by) == ("b", "c")


async def test_a_receipt_kept_from_another_step_speaks_against_who_hands_it_on() -> None:
    """A neighbour has all receipts of a hop. One of another step it would have to refuse."""
    ours, chain = book(), Chain()
    ours.unchecked.append(earlier := await chain.passed())
    old = earlier.receipts[0]
    ours.unchecked.append(await chain.passed(lambda receipts: [old, *receipts[1:]], at=0))
    with pytest.raises(ProtocolViolation, match="another step") as caught:
        await ours.check()
    assert (caught.value.peer_id, caught.value.told_by) == ("b", "")


async def test_a_receipt_kept_from_the_same_step_computed_before_is_between_the_two() -> None:
    """After a roll-back the same tokens give the same receipt but for its place in the chain."""
    ours, chain = book(), Chain()
    ours.unchecked.append(earlier := await chain.passed(position=0))
    old = earlier.receipts[0]
    again = await chain.passed(lambda receipts: [old, *receipts[1:]], at=0, position=0)
    ours.unchecked.append(again)
    with pytest.raises(ProtocolViolation, match="came after") as caught:
        await ours.check()
    assert (caught.value.peer_id, caught.value.told_by) == ("a", "b")


async def test_two_receipts_for_one_step_are_equivocation() -> None:
    ours, chain = book(), Chain()
    ours.unchecked.append(await chain.passed())
    ours.unchecked.append(await chain.passed(resigned(1, sequence=0), 1))
    with pytest.raises(Equivocation) as caught:
        await ours.check()
    assert caught.value.peer_id == "b"
    assert {decode_receipt(each).sequence for each in caught.value.receipts} == {0}


async def test_who_takes_over_in_a_session_begins_a_chain_of_its_own() -> None:
    ours = book()
    ours.unchecked.append(await Chain().passed())
    replaced = Chain(HOPS[0], Hop("d", BlockSpan(3, 5)), HOPS[2])
    passed = await replaced.passed()
    with pytest.raises(ProtocolViolation, match=r"two chains|begins|came after") as caught:
        ours.unchecked.append(passed)
        await ours.check()
    assert caught.value.peer_id == "a"  # which opened another chain in the same session


def hidden_states(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, 320, generator=torch.Generator().manual_seed(0)) * 0.1


async def opened(swarm: MemorySwarm, route: Route) -> Session:
    opening = open_session(
        swarm.network.host("client"),
        route,
        swarm.spec,
        max_tokens=64,
        codec="float32",
        config=SessionConfig(chunk_tokens=5),
        keep_steps=True,
    )
    return await start_session(swarm.network.nursery, opening)


async def test_every_hop_signs_for_every_step_of_a_session(checkpoint: Checkpoint) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a", 0, 3)
        await swarm.serve("b", 3, 8)
        session = await opened(swarm, route_over(a=(0, 3), b=(3, 8)))
        await session.prefill(hidden_states(12), 0)
        await session.decode(hidden_states(1), 12)
        await session.decode(hidden_states(2), 5)  # a roll-back
        assert await session.settle() is None
        assert session.book is not None
        said = [[decode_receipt(each) for each in passed.receipts] for passed in session.book.kept]
        assert [[(each.position, each.tokens, each.returned) for each in step] for step in said] == [
            [(0, 5, 5), (0, 5, 0)],
            [(5, 5, 5), (5, 5, 0)],
            [(10, 2, 2), (10, 2, 1)],
            [(12, 1, 1), (12, 1, 1)],
            [(5, 2, 2), (5, 2, 2)],
        ]
        assert [(each.start, each.stop, each.dtype) for each in said[0]] == [
            (0, 3, "float32"),
            (3, 8, "float32"),
        ]
        assert all(step[0].output == step[1].input for step in said)
        assert [step[1].output for step in said] == [digest_of(each.got) for each in session.book.kept]
        await session.aclose()
        await swarm.all_closed()


async def test_a_forger_ends_its_session_while_it_runs(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a", 0, 3)
        await swarm.serve("b", 3, 8)
        swarm.network.hosts["b"].sign = partial(sign, "somebody else")
        session = await opened(swarm, route_over(a=(0, 3), b=(3, 8)))
        with pytest.raises(ProtocolViolation, match="signature") as caught:
            for position in range(64):
                await session.decode(hidden_states(1), position)
        assert caught.value.peer_id == "b"
        assert len(session.timings) >= CHECK_EVERY
        assert isinstance(session.broken_receipt, PeerError)
        assert await session.settle() is session.broken_receipt
        await session.aclose()


async def test_a_hop_refuses_what_its_predecessor_did_not_sign_for(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lie(self: ReceiptSigner, step: Step, received: bytes, sent: bytes, returned: int) -> Any:
        return await honest(self, step, received, sent if step.receipts else b"something else", returned)

    honest = ReceiptSigner.attest
    monkeypatch.setattr(ReceiptSigner, "attest", lie)
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a", 0, 3)
        await swarm.serve("b", 3, 8)
        session = await opened(swarm, route_over(a=(0, 3), b=(3, 8)))
        with pytest.raises(PeerError, match="not what its receipt says") as caught:
            await session.decode(hidden_states(1), 0)
        assert caught.value.peer_id == "a"
        await session.aclose()


async def test_a_hop_of_an_earlier_version_is_left_out_with_a_sentence(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unknown(*_: object, **__: object) -> None:
        raise PeerRefused(f"peer a does not speak {SESSION_PROTOCOL}", "a", "not_spoken")

    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a", 0, 8)
        monkeypatch.setattr(type(swarm.network.host("client")), "open_stream", unknown)
        with pytest.raises(PeerRefused, match="has to be updated") as caught:
            await opened(swarm, route_over(a=(0, 8)))
        assert (caught.value.peer_id, caught.value.is_lasting) == ("a", True)


DRAW = draw_of(SamplingConfig(seed=1), LogitsRules(), prompt_tokens=3, max_ids=9, eos_ids=(2,))


@pytest.mark.parametrize("signed", ["the last hop", "another hop", "nobody", "for another payload"])
async def test_draws_have_to_be_signed_by_the_last_hop(signed: str) -> None:
    """What went in and came out are no rows then, so receipts are held against each other alone."""
    ours = ReceiptBook(SESSION, REVISION, "float32", verify, draw=DRAW)
    passed = await Chain().passed()
    got = encode_draws(Draws((7,)))
    signer = HOPS[0 if signed == "another hop" else -1].peer_id
    digest, payload = digest_of(passed.receipts[-1]), b"" if signed == "for another payload" else got
    drawn = b"" if signed == "nobody" else sign_draws(DRAW, digest, payload, partial(sign, signer))
    ours.unchecked.append(passed._replace(sent=encode_ids((5,)), got=got, drawn=drawn))
    if signed == "the last hop":
        await ours.check()
        return
    with pytest.raises(ProtocolViolation, match="did not sign") as caught:
        await ours.check()
    assert caught.value.peer_id == HOPS[-1].peer_id
