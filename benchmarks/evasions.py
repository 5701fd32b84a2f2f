"""Tricks by which a lying node would get around audits, for `lying_node.py`: `skip+gap`, `int8+late`, ...

gap        receipts begin at 1; a made-up receipt 0 of four billion tokens is handed out when asked for
lastbreak  the last receipt of a session is broken
midbreak   a receipt in the middle of a session is garbage
late       evidence comes 12 s after it was asked for
trickle    evidence comes piece by piece, each just in time
withhold   no evidence is handed out
wary       the truth to whatever may be a second opinion: an inner span that the client feeds itself
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import trio

import p2pinfer.node.evidence.store as store
import p2pinfer.node.serve.server as server
import p2pinfer.node.swarm.membership as membership
from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.node.protocol.messages import Open, Step
from p2pinfer.node.serve.hop_session import HopSession
from p2pinfer.node.serve.receipt_signer import ReceiptSigner, SignedReceipt
from p2pinfer.reputation.receipt import NO_RECEIPT, RECEIPT_VERSION, Payload, Receipt, digest_of, sign_receipt

LATE_S: Final = 12.0
PIECE_S: Final = 7.0
EVASIONS: Final = ("gap", "lastbreak", "midbreak", "late", "trickle", "withhold", "wary")

Break = Callable[[int, int, bytes], bytes]  # position, positions reserved, receipt -> what is handed on
Answer = Callable[[Any], Awaitable[None]]
made_up: dict[bytes, bytes] = {}
spared: list[CacheLease] = []  # of sessions that are told the truth


def install(evasion: str) -> None:
    """Have nodes of this process evade audits in this way."""
    match evasion:
        case "gap":
            server.ReceiptSigner = BeginsAtOne  # type: ignore[misc]
            hand_out(
                lambda digests, held: [
                    made_up.get(each, got) for each, got in zip(digests, held, strict=False)
                ]
            )
        case "lastbreak":
            break_receipts(lambda at, room, said: said if at < room - 1 else said[:-1] + b"?")
        case "midbreak":
            break_receipts(lambda at, _, said: said if at < 20 else b"garbage")
        case "late":
            delay_answers(LATE_S)
        case "trickle":
            delay_answers(PIECE_S)
            hand_out(lambda _, held: only_first(held))
        case "withhold":
            hand_out(lambda _, held: [None for _ in held])
        case "wary":
            spare_second_opinions()
        case _:
            raise SystemExit(f"no evasion is called {evasion!r}; there are {', '.join(EVASIONS)}")


class BeginsAtOne(ReceiptSigner):
    """A signer whose first receipt is its second."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        opening = self._opening
        receipt = Receipt(
            RECEIPT_VERSION, opening.session, 0, NO_RECEIPT, opening.revision, opening.start, opening.stop, 0,
            2**32 - 1, 0, 0, self._dtype, opening.codec, bytes(32), bytes(32), self._nonce,
        )  # fmt: skip
        signed = sign_receipt(receipt, self._sign)
        self._sequence, self._previous = 1, digest_of(signed)
        made_up[self._previous] = signed


def break_receipts(breaks: Break) -> None:
    """Hand on what `breaks` makes of each receipt."""
    honest = ReceiptSigner.attest

    async def attest(self: ReceiptSigner, step: Step, *rest: Any) -> SignedReceipt:
        said = await honest(self, step, *rest)
        at, room = step.position + step.tokens, self._opening.max_tokens
        broken = breaks(at, room, said.receipt)
        return SignedReceipt(broken, said.receipt_digest, said.input_digest, said.output_digest)

    ReceiptSigner.attest = attest  # type: ignore[method-assign]


def hand_out(change: Callable[[Sequence[bytes], list[Payload | None]], list[Payload | None]]) -> None:
    """Answer with what `change` makes of the contents that are held."""
    honest_contents, honest_find = store.contents_for, store._find

    def contents_for(stores: Any, digests: Sequence[bytes], now: float) -> list[Payload | None]:
        return change(digests, honest_contents(stores, digests, now))

    def find(stores: Any, digest: bytes, now: float) -> Payload | None:
        return made_up.get(digest) or honest_find(stores, digest, now)

    store.contents_for, store._find = contents_for, find


def only_first(held: list[Payload | None]) -> list[Payload | None]:
    """The first content that is held, and none of the others."""
    first = next((index for index, each in enumerate(held) if each is not None), None)
    return [each if index == first else None for index, each in enumerate(held)]


def spare_second_opinions() -> None:
    """Note the sessions of an inner span that have no hop before them."""
    honest = server.SpanServer._admit

    def admit(self: server.SpanServer, opening: Open, *rest: Any) -> HopSession:
        session = honest(self, opening, *rest)
        if opening.start and opening.predecessor is None:
            spared.append(session.room.lease)
        return session

    server.SpanServer._admit = admit  # type: ignore[method-assign]


def delay_answers(seconds: float) -> None:
    """Answer requests for evidence so much later."""
    honest = membership.serve_evidence

    class Slow:
        def __init__(self, host: Any) -> None:
            self._host = host

        def __getattr__(self, name: str) -> Any:
            return getattr(self._host, name)

        def serve(self, protocol: str, answer: Answer) -> None:
            async def later(stream: Any) -> None:
                await trio.sleep(seconds)
                await answer(stream)

            self._host.serve(protocol, later)

    def serve(host: Any, *stores: Any, **rest: Any) -> None:
        honest(Slow(host), *stores, **rest)  # type: ignore[arg-type]

    membership.serve_evidence = serve
