"""Draw of the hops that are audited, how closely, and within which budget of processor time.

Hops say with every step how long they worked on it (`Bill`). Of that, a share is what audits may take
(`AuditConfig.share`). Each peer's record asks for a rate (`score.audit_probability`): high for newcomers and
for those who deviate, low for the others. Those others are audited at `ROUTINE_RATE` while the budget has
something left for them, which is three fifths of it at least: so all of it is spent, and nobody who is new or
doubtful, however often, keeps the others from being audited.

Peers are new when nothing has been earned yet. Their audits may therefore go ahead by `AHEAD`, those of
doubtful peers by up to `MOST_AHEAD`, which later sessions repay. Newcomers for whom nothing is left are drawn
as the others are, of what there is for these. Where nothing is left at all the rate is
`LEAST_RATE`. So, at whatever price audits have,

    spent <= share * work seen + MOST_AHEAD audits + LEAST_RATE of all sessions' audits

where the price of an audit is the mean, the loading of weights included. Who comes after newcomers that have
used all of it while there was nobody else may have another three tenths of the share, until that is repaid.

A hop that understates its work lowers the budget by its own part of it; one that overstates it raises it to
`share` of the time that the session took, and no further (`ReceiptBook.work_s`). An opinion counts as the
work of two mean sessions at most, whatever those say who gave it.

Most audits are glances (`Verifier.glance`). A part of them that no hop can foresee measures, and all do
for whom there is a doubt (`score.full_audit_probability`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from p2pinfer.client_config import AuditConfig
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.verdict import Finding
from p2pinfer.routing.route import Route

AHEAD: Final = 12  # audits of newcomers that may be done before they are earned
MOST_AHEAD: Final = 16  # those of doubtful peers included
ROUTINE_RATE: Final = 0.25  # of all others, while the budget has something left for them
ROUTINE_PART: Final = 0.6  # of the budget, that is theirs alone
VOTES_PART: Final = 0.5  # of the budget, that votes on others' proofs may take beside it
LEAST_RATE: Final = 0.01  # where nothing is left
OPINION_AT_MOST: Final = 2.0  # of a session's mean work, that one opinion counts as


class AuditBudget:
    """Processor time that audits have earned and spent.

    Args:
        share: Of the hops' work, 0 to 1.

    Attributes:
        earned_s: Seconds that audits may take.
        spent_s: Seconds that they took.
    """

    def __init__(self, share: float) -> None:
        self.earned_s = 0.0
        self.spent_s = 0.0
        self._share = share
        self._routine_s = 0.0
        self._votes_s = 0.0
        self._audits = 0
        self._work_s = 0.0
        self._sessions = 0

    def earn(self, work_s: float) -> None:
        """Note a session on which hops worked for so long."""
        self.earned_s += self._share * work_s
        self._work_s += work_s
        self._sessions += 1

    def credible(self, work_s: float) -> float:
        """Part of what others say that an opinion took them; all of it before the first session.

        Whoever is asked could else say that it worked for as long as it kept us waiting, and starve audits.
        """
        if not self._sessions:
            return work_s
        return min(work_s, OPINION_AT_MOST * self._work_s / self._sessions)

    def pay(self, spent_s: float, *, routine: bool) -> None:
        """Note what an audit took: runs, the loading of weights, the work of others who were asked."""
        self.spent_s += spent_s
        self._routine_s += routine * spent_s

    def pay_vote(self, spent_s: float) -> None:
        """Note what others say they took who voted on a proof; see `Auditor`."""
        self._votes_s += self.credible(spent_s)

    @property
    def has_for_votes(self) -> bool:
        """True if others may be asked to vote on a proof that cannot be run here."""
        return self._votes_s < VOTES_PART * self.earned_s + self._price_of(MOST_AHEAD)

    def count_audit(self) -> None:
        """Note that an audit is done."""
        self._audits += 1

    @property
    def has_for_routine(self) -> bool:
        """True if there is something left for peers of whom nothing speaks for an audit."""
        if self.spent_s < self.earned_s:
            return True
        # What others took beyond their part was the routine audits', of which half is left to them whatever
        # the loading of weights has taken.
        theirs_s = ROUTINE_PART * self.earned_s
        lent_s = self._others_s - (1 - ROUTINE_PART) * self.earned_s - self._price_of(MOST_AHEAD)
        return self._routine_s < theirs_s - min(max(lent_s, 0.0), theirs_s / 2)

    @property
    def is_within(self) -> bool:
        """True if no more was spent than is earned and may go ahead."""
        return self.spent_s < self.earned_s + self._price_of(AHEAD)

    def has_for_others(self, ahead: int) -> bool:
        """True if there is something left for newcomers and doubtful peers, with so many audits ahead."""
        if self._audits < ahead or self.spent_s < self.earned_s:
            return True
        return self._others_s < (1 - ROUTINE_PART) * self.earned_s + self._price_of(ahead)

    @property
    def _others_s(self) -> float:
        return self.spent_s - self._routine_s

    def _price_of(self, audits: int) -> float:
        """Seconds that so many audits take, by what they have taken so far."""
        return audits * self.spent_s / max(self._audits, 1)


class AuditDraw:
    """Decides whom to audit, on a coin that nobody but this process can know.

    Args:
        clock: The ledger's time in seconds.
    """

    def __init__(
        self, ledger: Ledger, config: AuditConfig, clock: Callable[[], float], rng: random.Random
    ) -> None:
        self.budget = AuditBudget(config.share)
        self._ledger = ledger
        self._config = config
        self._clock = clock
        self._rng = rng
        self._measured: set[str] = set()

    def toss(self, route: Route) -> frozenset[str]:
        """The hops to be checked after a session over `route` that is about to open."""
        return frozenset(hop.peer_id for hop in route.hops if self._rng.random() < self.rate_of(hop.peer_id))

    def rate_of(self, peer_id: str) -> float:
        """Probability with which a peer is audited in a session that opens now."""
        if self._config.rate is not None:
            return self._config.rate
        rate = self._ledger.audit_probability(peer_id, self._clock())
        if rate < ROUTINE_RATE:
            return ROUTINE_RATE if self.budget.has_for_routine else LEAST_RATE
        # Newcomers are used in few sessions, and audited in these no less than whom nothing speaks against.
        if self._is_drawn_as_routine(peer_id):
            return ROUTINE_RATE
        ahead = MOST_AHEAD if self._ledger.is_doubtful(peer_id) else AHEAD
        return rate if self.budget.has_for_others(ahead) else LEAST_RATE

    def pay(self, peer_id: str, spent_s: float) -> None:
        """Note what an audit of a peer took."""
        rate = self._ledger.audit_probability(peer_id, self._clock())
        self.budget.pay(spent_s, routine=rate < ROUTINE_RATE or self._is_drawn_as_routine(peer_id))

    def pay_opinion(self, peer_id: str, work_s: float) -> None:
        """Note what others say that an opinion on a peer took them."""
        self.pay(peer_id, self.budget.credible(work_s))

    def _is_drawn_as_routine(self, newcomer: str) -> bool:
        if self._ledger.is_doubtful(newcomer) or self.budget.has_for_others(AHEAD):
            return False
        return self.budget.has_for_routine and self.budget.is_within

    def paid(self, peer_id: str, finding: Finding) -> Finding:
        """The finding of an audit of the peer, once what it took is noted."""
        self.pay(peer_id, finding.spent_s)
        return finding

    def is_glance(self, peer_id: str) -> bool:
        """True if a glance will do for an audit of this peer, unless it shows something."""
        if self._config.rate is not None:
            return False
        full = self._ledger.full_audit_probability(peer_id)
        if full == 1.0 and not self._ledger.is_doubtful(peer_id) and peer_id in self._measured:
            # The first whole audit is under way, with weights to load, and more of them came meanwhile.
            full = self._ledger.config.full_audit_share
        is_glance = self._rng.random() >= full
        if not is_glance:
            self._measured.add(peer_id)
        return is_glance
