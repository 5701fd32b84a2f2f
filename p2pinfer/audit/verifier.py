"""Judgement of a hop's work, by whatever means: the interface that users implement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from p2pinfer.models.span import BlockSpan
from p2pinfer.node.evidence.hop_record import HopRecord
from p2pinfer.reputation.verdict import Finding, Verdict

if TYPE_CHECKING:
    from p2pinfer.node.evidence.end_claims import EndClaims
    from p2pinfer.node.evidence.pass_record import PassRecord


class Verifier(ABC):
    """Says whether a hop computed what it was asked to. Subclass it and pass an instance to `Client`.

    Only `verify` has to be written. The other methods say what else an auditor may ask, and have defaults for
    a verifier that gives the same answer whenever it is asked.
    """

    def can_hold(self, span: BlockSpan) -> bool:
        """True if blocks of this span can be judged here; if not, two other peers are asked to run them."""
        return True

    @abstractmethod
    async def verify(self, record: HopRecord) -> Finding:
        """The verdict on what the hop's receipts name. The payloads' digests have been checked.

        A FAIL bans the peer once `confirm` repeats it, so where in doubt the verdict is INCONCLUSIVE.
        """

    async def glance(self, record: HopRecord) -> Finding:
        """PASS at a lower price than `verify`'s, which may miss small lies; otherwise `verify` decides.

        Most audits are glances, so that there can be more of them. By default nothing passes at a glance.
        """
        return Finding(Verdict.INCONCLUSIVE, "nothing passes at a glance")

    async def verify_fully(self, record: HopRecord) -> Finding:
        """The same with all means, for a proof that somebody else has published; `verify` by default."""
        return await self.verify(record)

    def is_thorough(self, finding: Finding) -> bool:
        """True if a PASS of `verify_fully` refutes somebody else's FAIL; True by default."""
        return True

    async def verify_ends(self, record: HopRecord, claims: EndClaims) -> Finding:
        """The verdict on what a hop embedded or drew for a client without weights; none by default.

        It is confirmed already: a FAIL bans.
        """
        return Finding(Verdict.INCONCLUSIVE, "embedding and head are not looked at")

    async def confirm(self, record: HopRecord) -> Finding:
        """A verdict that does not rest on what `verify` keeps in memory; `verify` by default."""
        return await self.verify(record)

    async def verify_pass(self, record: PassRecord) -> Finding:
        """The verdict on a pass of training; INCONCLUSIVE by default. A FAIL counts as that of `verify`."""
        return Finding(Verdict.INCONCLUSIVE, "this verifier does not judge training")

    async def confirm_pass(self, record: PassRecord) -> Finding:
        """A verdict that does not rest on what `verify_pass` keeps in memory; `verify_pass` by default."""
        return await self.verify_pass(record)
