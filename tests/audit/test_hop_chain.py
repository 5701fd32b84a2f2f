"""What a client did not see of a hop's receipts is asked for, and held to the rules of all others."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from p2pinfer.audit.hop_chain import MAX_UNSEEN, HopChain, TooManyUnseen, Withheld, fill_chain
from p2pinfer.errors import Equivocation, ProtocolViolation
from p2pinfer.reputation.receipt import NO_RECEIPT, RECEIPT_VERSION, Receipt, digest_of, sign_receipt

from ..node.memory import sign, verify

BASE: dict[str, Any] = {
    "version": RECEIPT_VERSION,
    "session": b"s" * 16,
    "revision": "r" * 32,
    "start": 3,
    "stop": 5,
    "epoch": 0,
    "dtype": "float32",
    "codec": "float32",
    "input": bytes(32),
    "output": bytes(32),
    "nonce": b"n" * 16,
}


class Hop:
    """Signs whatever it is told to, and hands out what it has signed."""

    def __init__(self) -> None:
        self.signed: list[bytes] = []
        self.held: dict[bytes, bytes] = {}
        self.asked = 0

    def step(self, position: int, tokens: int = 1, **fields: Any) -> bytes:
        """The receipt of the next step; `fields` are its lies."""
        said: dict[str, Any] = {
            **BASE,
            "sequence": len(self.signed),
            "previous": digest_of(self.signed[-1]) if self.signed else NO_RECEIPT,
            "position": position,
            "tokens": tokens,
            "returned": tokens,
            **fields,
        }
        signed = sign_receipt(Receipt(**said), partial(sign, "hop"))
        self.signed.append(signed)
        self.held[digest_of(signed)] = signed
        return signed

    async def fetch(self, digest: bytes) -> bytes | None:
        self.asked += 1
        return self.held.get(digest)

    async def fill(self, *seen: bytes, is_last: bool = False) -> HopChain:
        return await fill_chain("hop", seen, self.fetch, verify, is_last=is_last)


async def test_what_was_never_superseded_needs_no_asking() -> None:
    hop = Hop()
    seen = [hop.step(position) for position in range(4)]
    chain = await hop.fill(*seen)
    assert [signed for signed, _ in chain.receipts] == seen
    assert hop.asked == 0


async def test_superseded_steps_and_replays_are_asked_for_and_put_in_their_place() -> None:
    hop = Hop()
    first = hop.step(0, 8)
    hop.step(8)  # dropped further on: a hop died, and the step was sent again
    again = hop.step(8, epoch=1)
    chain = await hop.fill(first, again)
    assert [receipt.position for _, receipt in chain.receipts] == [0, 8, 8]
    assert [chain.is_unseen(index) for index in range(3)] == [False, True, False]
    joined = Hop()  # fed by a replay under the epoch before, and by one under its own
    joined.step(0, 256)
    joined.step(256, 44, epoch=1)
    chain = await joined.fill(joined.step(300, epoch=1))
    assert [chain.is_unseen(index) for index in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("complaint", "lie"),
    [
        ("another session", {"session": b"t" * 16}),
        ("another session", {"revision": "f" * 32}),
        ("another session", {"start": 2}),
        ("another session", {"codec": "bfloat16"}),
        ("two chains", {"dtype": "bfloat16"}),
        ("two chains", {"nonce": b"m" * 16}),
        ("cannot be", {"tokens": 0, "returned": 0}),
        ("cannot be", {"returned": 0}),
        ("leave position 8 out", {"position": 9}),
        ("that nobody sent", {"tokens": 2**32 - 1, "returned": 2**32 - 1}),
    ],
)
async def test_what_was_not_seen_is_held_to_all_rules(complaint: str, lie: dict[str, Any]) -> None:
    """Any of these made every audit of a hop come to nothing, at no price."""
    hop, lie = Hop(), dict(lie)
    first = hop.step(0, 8)
    hop.step(lie.pop("position", 8), **lie)
    again = hop.step(8, epoch=1)
    with pytest.raises(ProtocolViolation, match=complaint) as caught:
        await hop.fill(first, again)
    assert caught.value.peer_id == "hop"


async def test_a_last_hop_may_return_fewer_rows_than_it_was_given() -> None:
    hop = Hop()
    hop.step(0, 8, returned=0)
    again = hop.step(8, epoch=1)
    assert len((await hop.fill(again, is_last=True)).receipts) == 2
    with pytest.raises(ProtocolViolation, match="cannot be"):
        await hop.fill(again)


async def test_a_gap_that_no_epoch_explains_is_the_hops_fault_and_costs_no_request() -> None:
    hop = Hop()
    hop.step(0)
    for sequence in (1, 500, 2**32 - 1):
        fields: dict[str, Any] = {
            "sequence": sequence,
            "previous": digest_of(hop.signed[0]),
            "epoch": int(sequence > 1),
        }
        later = hop.step(0, 40, **fields)
        with pytest.raises(ProtocolViolation, match="where 0 is due"):
            await hop.fill(later)
    assert hop.asked == 0


async def test_more_unseen_than_are_asked_for_are_nobodys_fault_in_a_long_session() -> None:
    hop = Hop()
    for position in range(MAX_UNSEEN + 1):
        hop.step(256 * position, 256)
    with pytest.raises(TooManyUnseen):
        await hop.fill(hop.step(256 * (MAX_UNSEEN + 1), epoch=1))
    assert hop.asked == 0


async def test_what_came_before_more_unseen_than_are_asked_for_is_audited() -> None:
    """Else a hop could leave out many after a repair, and all that it did in the session went unaudited."""
    hop = Hop()
    seen = [hop.step(256 * position, 256) for position in range(20)]
    for _ in range(MAX_UNSEEN + 1):
        hop.step(256 * 20)
    later = [hop.step(256 * 20, epoch=1), hop.step(256 * 20 + 1, epoch=1)]
    chain = await hop.fill(*seen, *later)
    assert [signed for signed, _ in chain.receipts] == seen
    assert hop.asked == 0
    # Nor does what came after it: what the client has seen leaves no position out.
    before, alone = chain.parts()
    assert before is not alone and before.is_whole and not alone.is_whole
    assert [signed for signed, _ in alone.receipts] == [*seen, *later]


async def test_what_came_before_a_replay_can_be_looked_at() -> None:
    """True outputs, signed for when an epoch begins, would else stand in place of what the client got."""
    hop = Hop()
    seen = [hop.step(0, 8, output=b"l" * 32), hop.step(8, output=b"i" * 32)]
    hop.step(0, 9, epoch=1)  # nobody sent it
    seen += [hop.step(9, epoch=1, output=b"e" * 32), hop.step(10, epoch=1)]
    hop.step(0, 11, epoch=2)
    seen.append(hop.step(11, epoch=2))
    first, alone = (await hop.fill(*seen)).parts()
    assert [signed for signed, _ in first.receipts] == seen[:2]
    assert [signed for signed, _ in alone.receipts] == seen
    assert (first.is_whole, alone.is_whole) == (True, False)


async def test_what_came_before_a_replay_at_a_last_hop_can_be_looked_at() -> None:
    """Its replays return nothing, so that nothing at all would be left to be audited."""
    hop = Hop()
    shown = [hop.step(0, 8, output=b"l" * 32)]
    hop.step(0, 8, returned=0, epoch=1)
    shown.append(hop.step(8, epoch=1))
    before, alone = (await hop.fill(*shown, is_last=True)).parts()
    assert [signed for signed, _ in before.receipts] == shown[:1]
    assert [signed for signed, _ in alone.receipts] == shown


async def test_what_the_client_took_back_itself_is_no_replay() -> None:
    hop = Hop()
    seen = [hop.step(0, 8), hop.step(8, 4)]  # four guesses, of which three were wrong
    hop.step(9, 4)  # superseded on its way
    chain = await hop.fill(*seen, hop.step(9, 4, epoch=1), hop.step(13, epoch=1))
    assert chain.parts() == [chain]
    joined = Hop()  # fed before it was used
    joined.step(0, 8)
    chain = await joined.fill(joined.step(8, epoch=1))
    assert chain.parts() == [chain]


async def test_what_is_not_handed_out_is_withheld_and_shields_nothing_before_it() -> None:
    hop = Hop()
    first = hop.step(0)
    hop.held.pop(digest_of(hop.step(1)))
    seen = [first, hop.step(1, epoch=1), hop.step(2, epoch=1)]
    chain = await hop.fill(*seen)
    assert [signed for signed, _ in chain.receipts] == [first]
    (alone,) = chain.parts()
    assert [signed for signed, _ in alone.receipts] == seen
    assert isinstance(alone.withheld, Withheld)
    joined = Hop()
    joined.held.pop(digest_of(joined.step(0)))
    with pytest.raises(Withheld):
        await joined.fill(joined.step(1, epoch=1))


async def test_two_receipts_for_one_place_are_met_where_the_chain_names_the_other_one() -> None:
    hop = Hop()
    shown = hop.step(0, 8)
    hop.signed.clear()
    other = hop.step(0, 8, output=b"o" * 32)
    hop.step(8)
    again = hop.step(8, epoch=1)
    with pytest.raises(Equivocation) as caught:
        await hop.fill(shown, again)
    assert caught.value.receipts == (shown, other)
    hop.held.pop(digest_of(other))
    chain = await hop.fill(shown, again)
    assert [signed for signed, _ in chain.receipts] == [shown]
    assert isinstance(chain.withheld, Withheld)


async def test_what_was_seen_is_checked_again() -> None:
    hop = Hop()
    seen = hop.step(0)
    for broken in (b"garbage", b"", seen[:-1] + bytes([seen[-1] ^ 1])):
        with pytest.raises(ProtocolViolation) as caught:
            await hop.fill(broken)
        assert caught.value.peer_id == "hop"
