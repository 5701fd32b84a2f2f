"""Collection of a hop's record after a session: its receipts, and the tensors that they name.

What the client sent to the first hop and got from the last one it has itself. The rest is asked of the hop
that committed to it. What it does not hand out, its neighbours may have: one's output is the next one's
input.

Nothing that comes in here is taken for checked. A hop is at fault if its receipts or tensors do not fit, if
it withholds them, or if it is late with them. What cannot be had for another reason is nobody's fault. A hop
that is slow and in time is audited by what has come when the time is over: the beginning of its session.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import trio

from p2pinfer.errors import Equivocation, PeerError, PeerUnreachable, ProtocolViolation, WrongOutput
from p2pinfer.models.numerics import row_bytes, unpacked_codec
from p2pinfer.node.evidence.end_claims import EndClaims
from p2pinfer.node.evidence.hop_record import HopRecord, history_of
from p2pinfer.node.evidence.store import ANSWER_S
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.draws import Draw, Log, decode_draws, decode_ids
from p2pinfer.reputation.proof import tensors_of
from p2pinfer.reputation.receipt import Payload, Receipt, digest_of
from p2pinfer.routing.route import Hop
from p2pinfer.session.receipt_checks import PassedStep

from .evidence_source import EvidenceSource, Line, NotTheirs, next_piece
from .hop_chain import HopChain, TooManyUnseen, Withheld, fill_chain

HEAD_START_S: Final = 2.0  # for the hop itself, before its neighbours are asked as well


@dataclass(frozen=True, slots=True)
class Collected:
    """Evidence that could be collected of one hop.

    Attributes:
        record: None if something is missing even so.
        fault: What the hop itself is to blame for: evidence withheld, late, or not fitting. Empty: nothing.
        contradiction: Two receipts that it signed for one place, if it did.
        is_cut: A receipt is withheld. That the record is in order clears nobody of that.
    """

    record: HopRecord | None
    fault: str = ""
    contradiction: tuple[bytes, ...] = ()
    is_cut: bool = False


async def collect_record(
    host: Network,
    steps: Sequence[PassedStep],
    peer_id: str,
    hidden_size: int,
    *,
    max_bytes: int,
    max_tokens: int,
    timeout_s: float = 60.0,
    line: Line | None = None,
    is_fresh: bool = True,
    was_slow: bool = False,
    on_slow: Callable[[], Awaitable[None]] | None = None,
    rng: random.Random | None = None,
) -> Collected:
    """Collect what `peer_id` did in the session of `steps`.

    Of a long session it is the beginning, which does not depend on what came after.

    Args:
        max_bytes: What all tensors may take.
        max_tokens: Positions that are of interest.
        timeout_s: For half of it further pieces are asked for, and for all of it neighbours may take.
        line: Shared by all that is fetched at once.
        is_fresh: True if the session has just ended. Later on a hop may have had to make room.
        was_slow: True if the hop kept an earlier process waiting; then it is no excuse for one in reach.
        on_slow: Called if the hop has not handed out all after `ANSWER_S`.
        rng: Draws which part is looked at where receipts that were not seen may hide others.
    """
    mine = [
        (each, index)
        for each in steps
        if (index := place_of(each, peer_id)) is not None and len(each.receipts) == len(each.hops)
    ]
    if not mine:
        return Collected(None)
    passed, index = mine[-1]
    source = EvidenceSource(host, passed.hops[index], line or Line())
    try:
        chain = await fill_chain(
            peer_id,
            [each.receipts[index] for each, index in mine],
            source.fetch_receipt,
            host.verify,
            is_last=index == len(passed.hops) - 1,
        )
    except Equivocation as exc:
        return Collected(None, str(exc), exc.receipts)
    except PeerError as exc:
        return Collected(None, _fault_of(exc, is_fresh=is_fresh, was_slow=was_slow))
    except (NotTheirs, TooManyUnseen):
        return Collected(None)
    # Which part it is, the hop cannot know: what it hides from one of them another one shows.
    chain = (rng or random.SystemRandom()).choice(chain.parts())
    wanted = await trio.to_thread.run_sync(_plan, chain, mine, hidden_size, max_bytes, max_tokens)
    if not wanted.signed:
        return Collected(None, wanted.fault)
    withheld, is_gone = await _fetch(host, source, mine, wanted, timeout_s, on_slow)
    count = _complete(wanted)
    if not count or (withheld and count < len(wanted.receipts)):
        counts = is_fresh or (was_slow and not is_gone)
        return Collected(None, withheld if counts else "")
    record = HopRecord(peer_id, wanted.signed[:count], wanted.receipts[:count], wanted.contents)
    unfit = await trio.to_thread.run_sync(_unfit, record, hidden_size, max_tokens)
    if unfit:
        return Collected(None, unfit)
    if chain.withheld is None or withheld:
        return Collected(record, withheld)
    return Collected(record, _fault_of(chain.withheld, is_fresh=is_fresh, was_slow=was_slow), is_cut=True)


def _fault_of(error: PeerError, *, is_fresh: bool, was_slow: bool) -> str:
    """Fault of a hop whose receipts are not to be had, or do not fit; empty: nothing."""
    counts = is_fresh or (was_slow and not isinstance(error, PeerUnreachable))
    is_lie = isinstance(error, ProtocolViolation) and not isinstance(error, Withheld)
    return f"its receipts do not fit: {error}" if is_lie or counts else ""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The part of a chain that is looked at, its tensors' sizes, and what of them is here already."""

    signed: tuple[bytes, ...]
    receipts: tuple[Receipt, ...]
    sizes: dict[bytes, int]
    contents: dict[bytes, Payload]
    fault: str = ""


def _plan(
    chain: HopChain,
    mine: Sequence[tuple[PassedStep, int]],
    hidden_size: int,
    max_bytes: int,
    max_tokens: int,
) -> _Wanted:
    """The longest beginning of a chain whose tensors, less what was rolled back, stay within the bounds."""
    row = row_bytes(hidden_size, unpacked_codec(chain.receipts[0][1].codec))
    standing: list[tuple[int, int, int]] = []  # start, stop, bytes
    size = longest = 0
    for count, (_, receipt) in enumerate(chain.receipts, 1):
        while standing and standing[-1][1] > receipt.position:
            start, _, step_bytes = standing.pop()
            if start < receipt.position:
                standing.append((start, receipt.position, step_bytes))
            else:
                size -= step_bytes
        stop, step_bytes = receipt.position + receipt.tokens, (receipt.tokens + receipt.returned) * row
        standing.append((receipt.position, stop, step_bytes))
        size += step_bytes
        if size <= max_bytes and stop <= max_tokens:
            longest = count
    fault = ""
    if not longest and chain.is_unseen(0):
        fault = "what it says it computed unseen leaves nothing to be audited"
    kept = chain.receipts[:longest]
    receipts = tuple(receipt for _, receipt in kept)
    sizes: dict[bytes, int] = {}
    tensors = {*tensors_of(receipts)}
    for receipt in receipts:
        for digest, rows in ((receipt.input, receipt.tokens), (receipt.output, receipt.returned)):
            if digest in tensors:
                sizes[digest] = rows * row
    own = _own_contents(mine)
    contents = {digest: own[digest] for digest in sizes if digest in own}
    return _Wanted(tuple(signed for signed, _ in kept), receipts, sizes, contents, fault)


async def _fetch(
    host: Network,
    source: EvidenceSource,
    mine: Sequence[tuple[PassedStep, int]],
    wanted: _Wanted,
    timeout_s: float,
    on_slow: Callable[[], Awaitable[None]] | None,
) -> tuple[str, bool]:
    """Add what is missing to `wanted.contents`.

    Returns:
        What the hop is to blame for, if anything, and whether it could not be reached at all.

    A hop that takes its time is not waited for where its neighbours have all that it has.
    """
    withheld, is_gone = "", False
    hop_done = trio.Event()
    began_at = trio.current_time()

    def missing() -> dict[bytes, int]:
        return {digest: size for digest, size in wanted.sizes.items() if digest not in wanted.contents}

    async def ask(each: EvidenceSource) -> bool:
        """False if the peer does not hand something out."""
        lacking: set[bytes] = set()
        while trio.current_time() < began_at + timeout_s / 2:
            piece = next_piece({digest: size for digest, size in missing().items() if digest not in lacking})
            if not piece:
                break
            wanted.contents.update(await each.fetch_piece(piece))
            lacking |= piece.keys() - wanted.contents.keys()
        return not lacking

    async def ask_hop() -> None:
        nonlocal withheld, is_gone
        try:
            if not await ask(source):
                withheld = "it withholds evidence that it committed to"
        except NotTheirs:
            pass
        except PeerError as exc:
            withheld, is_gone = f"it withholds evidence: {exc}", isinstance(exc, PeerUnreachable)
        hop_done.set()

    async def look_at_the_clock() -> None:
        with trio.move_on_after(ANSWER_S):
            await hop_done.wait()
        if on_slow is not None and not hop_done.is_set():
            await on_slow()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask_hop)
        nursery.start_soon(look_at_the_clock)
        with trio.move_on_after(HEAD_START_S):
            await hop_done.wait()
        with trio.move_on_at(began_at + timeout_s):
            for hop in _neighbours(mine):
                with suppress(PeerError, NotTheirs):
                    await ask(EvidenceSource(host, hop, source.line))
        if not missing():
            nursery.cancel_scope.cancel()
    return withheld, is_gone


def _complete(wanted: _Wanted) -> int:
    """Number of receipts in the longest beginning whose tensors are all here."""
    count = len(wanted.receipts)
    while missing := {*tensors_of(wanted.receipts[:count])} - wanted.contents.keys():
        count = next(
            index
            for index, receipt in enumerate(wanted.receipts)
            if receipt.input in missing or receipt.output in missing
        )
    return count


def _unfit(record: HopRecord, hidden_size: int, max_tokens: int) -> str:
    """Fault of a record that no honest hop can have signed for; empty if it has none."""
    try:
        history_of(record, hidden_size, max_tokens=max_tokens)
    except WrongOutput:
        return ""  # a verdict, which is the verifier's
    except ProtocolViolation as exc:
        return f"its evidence does not fit its receipts: {exc}"
    return ""


def place_of(passed: PassedStep, peer_id: str) -> int | None:
    """Place of a peer among a step's hops; None if it was none of them: hops may be replaced in a session."""
    return next((index for index, hop in enumerate(passed.hops) if hop.peer_id == peer_id), None)


def claims_of(
    steps: Sequence[PassedStep], record: HopRecord, draw: Draw | None, vocab_size: int
) -> EndClaims | None:
    """Claims of a peer in the steps of a session with these terms, as far as its record goes; None if none.

    A step that was rolled back and done again counts as it was done last, as it does in the hop's history.
    """
    signed = {*record.signed}
    embedded: dict[int, int] = {}
    drawn: dict[int, int] = {}
    logs: dict[int, Log] = {}
    for passed in steps if draw is not None else ():
        step, at = passed.step, place_of(passed, record.peer_id)
        if at is None or signed.isdisjoint(passed.receipts[at : at + 1]):
            continue
        try:
            if at == 0:
                ids = decode_ids(passed.sent, step.tokens, vocab_size)
                embedded.update(enumerate(ids, step.position))
            if at == len(passed.hops) - 1 and step.returns:
                draws = decode_draws(passed.got, step.returns, vocab_size)
                first = step.position + step.tokens - step.returns
                drawn.update(enumerate(draws.ids, first))
                logs.update(enumerate(draws.logs, first))
        except ProtocolViolation:  # a step that the session itself has refused
            continue
    return EndClaims(draw, embedded, drawn, logs) if draw is not None and (embedded or drawn) else None


def _own_contents(mine: Sequence[tuple[PassedStep, int]]) -> dict[bytes, Payload]:
    """Contents that the client sent or got itself, by their digests."""
    contents: dict[bytes, Payload] = {}
    for passed, index in mine:
        if index == 0:
            contents[digest_of(passed.sent)] = passed.sent
        if index == len(passed.hops) - 1:
            contents[digest_of(passed.got)] = passed.got
    return contents


def _neighbours(mine: Sequence[tuple[PassedStep, int]]) -> list[Hop]:
    """The hops before and after, whoever they were in the course of the session."""
    found: dict[str, Hop] = {}
    for passed, index in mine:
        for hop in (*passed.hops[max(index - 1, 0) : index], *passed.hops[index + 1 : index + 2]):
            found[hop.peer_id] = hop
    return list(found.values())
