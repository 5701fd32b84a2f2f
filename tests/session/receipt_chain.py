"""Honest hops without a network that sign for every step, and what one of them may do to the receipts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from p2pinfer.models.numerics import FLOAT32
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.messages import Open, Step
from p2pinfer.node.serve.receipt_signer import ReceiptSigner
from p2pinfer.reputation.receipt import decode_receipt, sign_receipt
from p2pinfer.routing.route import Hop
from p2pinfer.session.receipt_checks import PassedStep, ReceiptBook

from ..node.memory import sign, verify

SESSION, REVISION = b"s" * 16, "r" * 32
HOPS = (Hop("a", BlockSpan(0, 3)), Hop("b", BlockSpan(3, 5)), Hop("c", BlockSpan(5, 8)))


class Tamper:
    """What one hop does to the receipts of a step, its own among them."""

    def __init__(self, change: Callable[[list[bytes]], list[bytes]], at: int = -1) -> None:
        self._change = change
        self.at = at

    def __call__(self, receipts: list[bytes]) -> list[bytes]:
        return self._change(receipts)


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

    async def passed(
        self, tamper: Callable[[list[bytes]], list[bytes]] = list, at: int = -1, position: int | None = None
    ) -> PassedStep:
        """The next step, with its receipts after `tamper` by the hop `at`; the hops behind take in all."""
        position = self.number if position is None else position
        step = Step(self.number, 0, position, 1, 1)
        payloads = [b"%d at %d" % (position, index) for index in range(len(self.hops) + 1)]
        self.number += 1
        receipts: list[bytes] = []
        for index, notary in enumerate(self._notaries):
            given = msgspec.structs.replace(step, receipts=tuple(receipts))
            receipts.append((await notary.attest(given, payloads[index], payloads[index + 1], 1)).receipt)
            if index == at % len(self.hops):
                receipts = tamper(receipts)
        return PassedStep(step, self.hops, payloads[0], payloads[-1], tuple(receipts))


def book(*, keep: bool = False) -> ReceiptBook:
    return ReceiptBook(SESSION, REVISION, "float32", verify, keep=keep)


def resigned(index: int, **fields: Any) -> Tamper:
    """One hop's receipt with other contents, which it signs."""

    def tamper(receipts: list[bytes]) -> list[bytes]:
        said = msgspec.structs.replace(decode_receipt(receipts[index]), **fields)
        receipts[index] = sign_receipt(said, partial(sign, HOPS[index].peer_id))
        return receipts

    return Tamper(tamper, index)


def changed(change: Callable[[list[bytes]], list[bytes]]) -> Tamper:
    return Tamper(change)


def without(*gone: int) -> Tamper:
    return Tamper(lambda receipts: [each for index, each in enumerate(receipts) if index not in gone])


JUNK_FOR_B = changed(lambda receipts: [receipts[0], b"junk", *receipts[2:]])
BREAKS_A = changed(lambda receipts: [receipts[0][:-1] + b"?", *receipts[1:]])
BREAKS_B = changed(lambda receipts: [receipts[0], receipts[1][:-1] + b"?", *receipts[2:]])
