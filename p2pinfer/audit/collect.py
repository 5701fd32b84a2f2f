"""Collection of a hop's record after a session: its receipts, and the tensors that they name.

What the client sent to the first hop and got from the last one it has itself. The rest is asked of the hop
that committed to it. What it does not hand out, its neighbours may have: one's output is the next one's
input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from p2pinfer.errors import PeerError, ProtocolViolation
from p2pinfer.models.numerics import row_bytes
from p2pinfer.node.evidence.hop_record import HopRecord
from p2pinfer.node.evidence.store import MAX_DIGESTS, fetch_evidence
from p2pinfer.node.host.host import Host
from p2pinfer.reputation.proof import tensors_of
from p2pinfer.reputation.receipt import MAX_RECEIPT_BYTES, Payload, Receipt, decode_receipt, open_receipt
from p2pinfer.routing.route import Hop
from p2pinfer.session.receipt_checks import PassedStep

MAX_RECEIPTS_FETCHED: Final = 256


@dataclass(frozen=True, slots=True)
class Collected:
    """Evidence that could be collected of one hop.

    Attributes:
        record: None if something is missing even so.
        withheld: Why the hop itself is to blame for evidence that it did not hand out; empty if it did.
    """

    record: HopRecord | None
    withheld: str = ""


async def collect_record(
    host: Host,
    steps: Sequence[PassedStep],
    peer_id: str,
    hidden_size: int,
    *,
    max_bytes: int,
    max_tokens: int,
) -> Collected:
    """Collect what `peer_id` did in the session of `steps`, whose receipts have been checked.

    Of a long session it is the beginning, which does not depend on what came after.

    Args:
        max_bytes: What all tensors may take.
        max_tokens: Positions that are of interest.
    """
    places = [(each, _index_of(each, peer_id)) for each in steps]
    mine = [(each, index) for each, index in places if index is not None]
    if not mine:
        return Collected(None)
    hop = mine[0][0].hops[mine[0][1]]
    # Thousands of receipts take tens of milliseconds to read.
    known = await trio.to_thread.run_sync(_decode_all, [each.receipts[index] for each, index in mine])
    try:
        chain = await _whole_chain(host, hop, known)
    except PeerError as exc:
        return Collected(None, f"its receipts have gaps that it does not fill: {exc}")
    wanted = await trio.to_thread.run_sync(_plan, chain, mine, hidden_size, max_bytes, max_tokens)
    if not wanted.signed:
        return Collected(None)
    contents, withheld = wanted.contents, ""
    for source in (hop, *_neighbours(mine)):
        missing = [digest for digest in wanted.tensors if digest not in contents]
        if not missing:
            break
        try:
            await _fetch_all(host, source, missing, contents, max_bytes)
        except PeerError as exc:
            withheld = withheld or (f"it withholds evidence: {exc}" if source is hop else "")
        if source is hop and any(digest not in contents for digest in wanted.tensors):
            withheld = withheld or "it withholds evidence that it committed to"
    if any(digest not in contents for digest in wanted.tensors):
        return Collected(None, withheld)
    return Collected(HopRecord(peer_id, wanted.signed, wanted.receipts, contents), withheld)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The part of a chain that is looked at, and what of its tensors is here already."""

    signed: tuple[bytes, ...]
    receipts: tuple[Receipt, ...]
    tensors: tuple[bytes, ...]
    contents: dict[bytes, Payload]


def _plan(
    chain: Sequence[tuple[bytes, Receipt]],
    mine: Sequence[tuple[PassedStep, int]],
    hidden_size: int,
    max_bytes: int,
    max_tokens: int,
) -> _Wanted:
    kept: list[tuple[bytes, Receipt]] = []
    size = 0
    for signed, receipt in chain:
        size += (receipt.tokens + receipt.returned) * row_bytes(hidden_size, receipt.codec)
        if size > max_bytes or receipt.position + receipt.tokens > max_tokens:
            break
        kept.append((signed, receipt))
    receipts = tuple(receipt for _, receipt in kept)
    tensors = tensors_of(receipts)
    own = _own_contents(mine)
    contents = {digest: own[digest] for digest in tensors if digest in own}
    return _Wanted(tuple(signed for signed, _ in kept), receipts, tensors, contents)


def _decode_all(signed: Sequence[bytes]) -> list[tuple[bytes, Receipt]]:
    return [(each, decode_receipt(each)) for each in signed]


async def _fetch_all(
    host: Host, hop: Hop, digests: Sequence[bytes], contents: dict[bytes, Payload], max_bytes: int
) -> None:
    """Add to `contents` what `hop` holds of `digests`."""
    missing = list(digests)
    while missing:
        found = await fetch_evidence(host, hop.peer_id, missing[:MAX_DIGESTS], hop.addrs, max_bytes=max_bytes)
        contents |= found
        rest = [digest for digest in missing if digest not in found]
        if not found:
            return
        missing = rest


async def _whole_chain(
    host: Host, hop: Hop, known: Sequence[tuple[bytes, Receipt]]
) -> list[tuple[bytes, Receipt]]:
    """`known` receipts with those that the client never saw, asked for by the digest in the next one.

    Raises:
        PeerError: The hop does not hand them out, or they do not fit.
    """
    chain: list[tuple[bytes, Receipt]] = []
    fetched = 0
    due = 0
    for signed, receipt in known:
        missing: list[tuple[bytes, Receipt]] = []
        wanted = receipt
        while wanted.sequence > due:
            fetched += 1
            if fetched > MAX_RECEIPTS_FETCHED:
                raise ProtocolViolation("too many receipts are missing", hop.peer_id)
            found = await fetch_evidence(
                host, hop.peer_id, [wanted.previous], hop.addrs, max_bytes=MAX_RECEIPT_BYTES
            )
            if wanted.previous not in found:
                raise ProtocolViolation(f"receipt {wanted.sequence - 1} is not handed out", hop.peer_id)
            earlier = open_receipt(found[wanted.previous], hop.peer_id, host.verify)
            if (earlier.nonce, earlier.sequence) != (receipt.nonce, wanted.sequence - 1):
                raise ProtocolViolation("a receipt of another chain", hop.peer_id)
            missing.append((found[wanted.previous], earlier))
            wanted = earlier
        chain += [*reversed(missing), (signed, receipt)]
        due = receipt.sequence + 1
    return chain


def _index_of(passed: PassedStep, peer_id: str) -> int | None:
    return next((index for index, hop in enumerate(passed.hops) if hop.peer_id == peer_id), None)


def _own_contents(mine: Sequence[tuple[PassedStep, int]]) -> dict[bytes, Payload]:
    """Contents that the client sent or got itself, by the digests in the checked receipts."""
    contents: dict[bytes, Payload] = {}
    for passed, index in mine:
        receipt = decode_receipt(passed.receipts[index])
        if index == 0:
            contents[receipt.input] = passed.sent
        if index == len(passed.hops) - 1:
            contents[receipt.output] = passed.got
    return contents


def _neighbours(mine: Sequence[tuple[PassedStep, int]]) -> list[Hop]:
    """The hops before and after, whoever they were in the course of the session."""
    found: dict[str, Hop] = {}
    for passed, index in mine:
        for hop in (*passed.hops[max(index - 1, 0) : index], *passed.hops[index + 1 : index + 2]):
            found[hop.peer_id] = hop
    return list(found.values())
