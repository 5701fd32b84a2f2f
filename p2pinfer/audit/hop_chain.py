"""Whole chain of one hop's receipts in a session: those that the client saw, and those that it asks for.

A client sees no receipt of steps that a later epoch superseded, nor of a replay by which a hop joined. The
hop hands them out by the digest that its next receipt names. They are held to the same rules as all others:
one session, model, span, codec and numerics; no sequence number left out; no position left out; and no more
of them than a session can have come to. What does not fit is the hop's own doing: nobody else can sign.

Where a receipt that was seen is not the one that its successor names, the hop has signed two for one place.
If it hands out the other one as well, both together are a proof.

What was not seen may hide what was. A later step rolls earlier ones back, so a hop that lied could sign,
whenever an epoch begins, for a replay that nobody sent, true and unseen. It could leave out more than one
audit asks for, or withhold it. Honest hops are fed such replays, and drop as many steps, so that is no fault.
But a client that had a hop from the beginning has seen a receipt for every position that stands. These alone
show what it got (`HopChain.parts`). They are no proof for others, who cannot tell what was seen.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import trio

from p2pinfer.errors import Equivocation, PeerError, ProtocolViolation
from p2pinfer.models.numerics import unpacked_codec
from p2pinfer.reputation.receipt import (
    CheckSignature,
    Receipt,
    ReceiptChain,
    Terms,
    contradict,
    decode_receipt,
    digest_of,
    open_receipt,
)

MAX_UNSEEN: Final = 64  # receipts asked for in one audit
_UNSEEN_EACH_EPOCH: Final = 32  # steps in flight on both sides of a hop, and as many again
_REPLAYED_AT_LEAST: Final = 16  # tokens of a step of a replay; 256 are usual
_LARGEST_STEP: Final = 1024  # tokens, where the client sent no larger one

FetchReceipt: TypeAlias = Callable[[bytes], Awaitable[bytes | None]]
Signed: TypeAlias = tuple[bytes, Receipt]


class Withheld(ProtocolViolation):
    """A receipt that the hop does not hand out."""


class TooManyUnseen(Exception):
    """More receipts are missing than one audit asks for, which an honest session may come to."""


@dataclass(frozen=True, slots=True)
class HopChain:
    """Receipts of a hop from its first one on.

    Attributes:
        receipts: Each as it was signed, and decoded.
        seen: The sequence numbers of those that the client got with its results.
        withheld: Why it ends before the session did, if the hop does not hand out the next one.
        alone: Those that were seen, if others are missing but no position is left out; they prove nothing.
        is_short: True if it ends where more is missing than is asked for.
    """

    receipts: tuple[Signed, ...]
    seen: frozenset[int]
    withheld: PeerError | None = None
    alone: HopChain | None = None
    is_short: bool = False

    @property
    def is_whole(self) -> bool:
        """True if no receipt is missing in between, as in a proof."""
        return len(self.receipts) == self.receipts[-1][1].sequence + 1

    def is_unseen(self, index: int) -> bool:
        """True if the client had to ask for this one."""
        return self.receipts[index][1].sequence not in self.seen

    def before_replay(self) -> HopChain | None:
        """The chain up to the first unseen step by which what the client has seen does not stand any more.

        None if there is none: what the client took back itself is no such step.
        """
        seen_stops = [0]  # before each receipt: where what was seen ended
        for index, (_, receipt) in enumerate(self.receipts):
            stop = 0 if self.is_unseen(index) else receipt.position + receipt.tokens
            seen_stops.append(max(seen_stops[-1], stop))
        least, found = math.inf, None  # the lowest position of what was seen later
        for index in range(len(self.receipts) - 1, -1, -1):
            receipt = self.receipts[index][1]
            if not self.is_unseen(index):
                least = min(least, receipt.position)
            elif receipt.position < min(seen_stops[index], least):
                found = index
        return None if found is None else replace(self, receipts=self.receipts[:found])

    def parts(self) -> list[HopChain]:
        """Parts of which one is looked at; the last one shows all that the client got.

        A hop that joined later has computed what nobody saw, so that of it everything has to be looked at.
        """
        before = self.before_replay()
        if self.alone is None:
            return [self] if before is None else [before, self]
        if self.withheld is not None:
            return [self.alone]
        if before is None and not self.is_short:
            return [self]
        return [before or self, self.alone]


async def fill_chain(
    peer_id: str, signed: Sequence[bytes], fetch: FetchReceipt, check: CheckSignature, *, is_last: bool
) -> HopChain:
    """The whole chain of a hop of which the client has the receipts `signed`, in their order.

    Args:
        fetch: Gives the receipt with a digest, as the hop hands it out; None if it does not.
        is_last: True if the hop is the last of its route, which may return fewer rows than it was given.

    Raises:
        ProtocolViolation: The receipts do not make one chain; `Withheld`: the first ones are not handed out.
        Equivocation: Two of them contradict each other.
        PeerError: As `fetch` does, of the first ones.
        TooManyUnseen: There are too many to ask for.
    """
    # Thousands of receipts take tens of milliseconds to read.
    all_seen = await trio.to_thread.run_sync(_decode_all, peer_id, signed)
    seen = all_seen[: _check_gaps(peer_id, all_seen)]
    chain: list[Signed] = []
    withheld: PeerError | None = None
    for each in seen:
        try:
            chain += [*await _unseen_before(peer_id, each, chain, fetch, check), each]
        except PeerError as exc:
            is_lie = isinstance(exc, ProtocolViolation) and not isinstance(exc, Withheld)
            if is_lie or not chain:
                raise
            withheld = exc  # which shields nothing that came before
            break
    await trio.to_thread.run_sync(_check_chain, peer_id, chain, check)
    numbers, is_short = frozenset(receipt.sequence for _, receipt in all_seen), len(seen) < len(all_seen)
    whole = HopChain(tuple(chain), numbers, withheld, is_short=is_short)
    _check_steps(peer_id, whole, is_last=is_last)
    alone = HopChain(tuple(all_seen), numbers, withheld)
    if alone.is_whole:
        return whole
    await trio.to_thread.run_sync(_check_chain, peer_id, all_seen, check)
    return replace(whole, alone=None if _leaves_out(alone) is not None else alone)


async def _unseen_before(
    peer_id: str, seen: Signed, chain: Sequence[Signed], fetch: FetchReceipt, check: CheckSignature
) -> list[Signed]:
    """Receipts between the end of `chain` and `seen`, oldest first."""
    found: list[Signed] = []
    wanted = seen[1]
    while wanted.sequence > len(chain):
        found.append(await _earlier(peer_id, wanted, fetch, check))
        wanted = found[-1][1]
    if chain and wanted.previous != digest_of(chain[-1][0]):
        other = await _earlier(peer_id, wanted, fetch, check)
        if contradict(chain[-1][1], other[1]):
            raise Equivocation(
                f"two receipts for step {other[1].sequence} of one session",
                peer_id,
                (chain[-1][0], other[0]),
            )
        raise ProtocolViolation(f"receipt {wanted.sequence} does not follow from the one before", peer_id)
    return found[::-1]


async def _earlier(peer_id: str, receipt: Receipt, fetch: FetchReceipt, check: CheckSignature) -> Signed:
    """The receipt that `receipt` names as the one before it."""
    signed = await fetch(receipt.previous)
    if signed is None:
        raise Withheld(f"receipt {receipt.sequence - 1} is not handed out", peer_id)
    earlier = open_receipt(signed, peer_id, check)
    if earlier.sequence != receipt.sequence - 1:
        raise ProtocolViolation("a receipt of another place in the chain", peer_id)
    return signed, earlier


def _decode_all(peer_id: str, signed: Sequence[bytes]) -> list[Signed]:
    try:
        return [(each, decode_receipt(each)) for each in signed]
    except ProtocolViolation as exc:
        exc.peer_id = peer_id
        raise


def _check_gaps(peer_id: str, seen: Sequence[Signed]) -> int:
    """Check before anything is asked for that no more is missing than the session's epochs explain.

    Returns:
        Number of receipts, from the first one on, between which no more than `MAX_UNSEEN` are missing. Who
        leaves out more hides what comes after them, and not what came before.
    """
    positions = max(receipt.position + receipt.tokens for _, receipt in seen)
    due = epoch = unseen = count = 0
    for index, (_, receipt) in enumerate(seen, 1):
        gap, epochs = receipt.sequence - due, receipt.epoch - epoch
        if gap < 0 or gap > epochs * (_UNSEEN_EACH_EPOCH + positions // _REPLAYED_AT_LEAST):
            raise ProtocolViolation(f"receipt {receipt.sequence} where {due} is due", peer_id)
        due, epoch, unseen = receipt.sequence + 1, receipt.epoch, unseen + gap
        count = index if unseen <= MAX_UNSEEN else count
    if not count:
        raise TooManyUnseen(f"{unseen} receipts were never seen here")
    return count


def _check_chain(peer_id: str, chain: Sequence[Signed], check: CheckSignature) -> None:
    first = chain[0][1]
    codec = unpacked_codec(first.codec)
    terms = Terms(first.session, first.revision, first.start, first.stop, codec)
    is_whole = len(chain) == chain[-1][1].sequence + 1
    receipts = ReceiptChain(peer_id, terms, check, whole=is_whole)
    for signed, _ in chain:
        receipts.extend(signed)


def _check_steps(peer_id: str, chain: HopChain, *, is_last: bool) -> None:
    """Check that the steps leave no position out, and that those never seen may have been asked for."""
    largest = max(_LARGEST_STEP, *(each.tokens for _, each in chain.receipts if each.sequence in chain.seen))
    if (left_out := _leaves_out(chain)) is not None:
        raise ProtocolViolation(f"its receipts leave position {left_out} out", peer_id)
    for index, (_, receipt) in enumerate(chain.receipts):
        if not receipt.tokens or (receipt.returned < receipt.tokens and not is_last):
            raise ProtocolViolation(f"receipt {receipt.sequence} is of a step that cannot be", peer_id)
        if chain.is_unseen(index) and receipt.tokens > largest:
            raise ProtocolViolation(f"receipt {receipt.sequence} is of a step that nobody sent", peer_id)


def _leaves_out(chain: HopChain) -> int | None:
    """The first position that no receipt is about though later ones are; None if there is none."""
    stop = 0
    for _, receipt in chain.receipts:
        if receipt.position > stop:
            return stop
        stop = receipt.position + receipt.tokens
    return None
