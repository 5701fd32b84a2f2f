"""The client's check of every receipt: over real hops, and against receipts that are not in order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest
import torch

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import Equivocation, PeerError, ProtocolViolation
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.numerics import FLOAT32
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.messages import Open, Step
from p2pinfer.node.serve.receipt_signer import ReceiptSigner
from p2pinfer.reputation.receipt import decode_receipt, digest_of, sign_receipt
from p2pinfer.routing.route import Hop, Route
from p2pinfer.session.hosting import open_session, start_session
from p2pinfer.session.receipt_checks import CHECK_EVERY, PassedStep, ReceiptBook
from p2pinfer.session.session import Session

from ..node.memory import sign, verify
from ..node.memory_swarm import MemorySwarm, open_memory_swarm, route_over

SESSION, REVISION = b"s" * 16, "r" * 32
HOPS = (Hop("a", BlockSpan(0, 3)), Hop("b", BlockSpan(3, 5)), Hop("c", BlockSpan(5, 8)))
Tamper = Callable[[list[bytes]], list[bytes]]


class Chain:
    """Honest hops without a network."""

    def __init__(self, *hops: Hop) -> None:
        self.hops = hops or HOPS
        self.number = 0
        self._notaries = [
            ReceiptSigner(
                Open(SESSION, REVISION, hop.span.start, hop.span.stop, 64, "float32"),
                FLOAT32,
                partial(sign, hop.peer_id),
            )
            for hop in self.hops
        ]

    async def passed(self, tamper: Tamper = lambda receipts: receipts) -> PassedStep:
        """The next step, with its receipts after `tamper`."""
        step = Step(self.number, 0, self.number, 1, 1)
        payloads = [b"%d at %d" % (self.number, index) for index in range(len(self.hops) + 1)]
        self.number += 1
        receipts = [
            (await notary.attest(step, payloads[index], payloads[index + 1], 1)).receipt
            for index, notary in enumerate(self._notaries)
        ]
        return PassedStep(step, self.hops, payloads[0], payloads[-1], tuple(tamper(receipts)))


def book(*, keep: bool = False) -> ReceiptBook:
    return ReceiptBook(SESSION, REVISION, "float32", verify, keep=keep)


def resigned(index: int, **fields: Any) -> Tamper:
    """One hop's receipt with other contents, which it signs."""

    def tamper(receipts: list[bytes]) -> list[bytes]:
        said = msgspec.structs.replace(decode_receipt(receipts[index]), **fields)
        receipts[index] = sign_receipt(said, partial(sign, HOPS[index].peer_id))
        return receipts

    return tamper


def changed(tamper: Tamper) -> Tamper:
    return tamper


def without(*gone: int) -> Tamper:
    return lambda receipts: [each for index, each in enumerate(receipts) if index not in gone]


@pytest.mark.parametrize("dtype", ["int8_bfloat16", "bfloat16_float32", "no_such_dtype"])
async def test_a_hop_whose_receipts_name_what_no_audit_can_run_again_is_to_blame(dtype: str) -> None:
    ours = book()
    ours.unchecked.append(await Chain().passed(resigned(1, dtype=dtype)))
    with pytest.raises(ProtocolViolation, match="cannot be checked") as caught:
        await ours.check()
    assert caught.value.peer_id == "b"


async def test_honest_receipts_pass_and_are_kept_only_if_asked() -> None:
    for keep in (False, True):
        ours, chain = book(keep=keep), Chain()
        ours.unchecked += [await chain.passed() for _ in range(CHECK_EVERY)]
        await ours.check()
        assert len(ours.kept) == keep * CHECK_EVERY
        await ours.check()


@pytest.mark.parametrize(
    ("tamper", "blamed", "complaint"),
    [
        (without(0), "a", "2 receipts from 3 hops"),
        (without(1), "b", "2 receipts from 3 hops"),
        (without(0, 1), "b", "1 receipts from 3 hops"),
        (without(0, 1, 2), "c", "0 receipts from 3 hops"),
        (changed(lambda receipts: [*receipts, receipts[-1]]), "c", "4 receipts from 3 hops"),
        (changed(lambda receipts: [receipts[0], b"junk", receipts[2]]), "b", "a receipt of 4 bytes"),
        (changed(lambda receipts: [receipts[1], receipts[0], receipts[2]]), "a", "signature"),
        (resigned(0, position=7), "a", "another step"),
        (resigned(1, tokens=2), "b", "another step"),
        (resigned(1, returned=0), "b", "another step"),
        (resigned(2, epoch=1), "c", "another step"),
        (resigned(1, dtype="bfloat16"), "b", "two chains"),
        (resigned(2, session=b"t" * 16), "c", "another session"),
        (resigned(0, input=bytes(32)), "a", "do not link"),
        (resigned(1, input=bytes(32)), "b", "do not link"),
        (resigned(1, output=bytes(32)), "c", "do not link"),  # an honest hop refuses such an input
        (resigned(2, output=bytes(32)), "c", "do not link"),
    ],
)
async def test_what_is_wrong_with_a_receipt_is_its_hop_s_fault(
    tamper: Tamper, blamed: str, complaint: str
) -> None:
    ours, chain = book(), Chain()
    ours.unchecked.append(await chain.passed())
    ours.unchecked.append(await chain.passed(tamper))
    with pytest.raises(ProtocolViolation, match=complaint) as caught:
        await ours.check()
    assert caught.value.peer_id == blamed


@pytest.mark.parametrize(
    ("tamper", "blamed", "told_by"),
    [
        (without(1), "b", "c"),
        (changed(lambda receipts: [receipts[0], b"junk", receipts[2]]), "b", "c"),
        (changed(lambda receipts: [receipts[0][:-1] + b"?", *receipts[1:]]), "a", "b"),
        (changed(lambda receipts: [*receipts[:2], receipts[2][:-1] + b"?"]), "c", ""),
        (resigned(1, tokens=2), "b", ""),  # it signed that
        (resigned(1, input=bytes(32)), "b", ""),
    ],
)
async def test_what_a_hop_did_not_sign_may_be_the_work_of_the_next_one(
    tamper: Tamper, blamed: str, told_by: str
) -> None:
    """Receipts go through the hands of all hops behind: one that spoils another's must not be believed."""
    ours = book()
    ours.unchecked.append(await Chain().passed(tamper))
    with pytest.raises(ProtocolViolation) as caught:
        await ours.check()
    assert (caught.value.peer_id, caught.value.told_by) == (blamed, told_by)


async def test_two_receipts_for_one_step_are_equivocation() -> None:
    ours, chain = book(), Chain()
    ours.unchecked.append(await chain.passed())
    ours.unchecked.append(await chain.passed(resigned(1, sequence=0)))
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
