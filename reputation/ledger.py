"""What we ourselves saw of each peer, forgotten slowly.

Each of the two scores is a Beta distribution: the prior's pseudo-counts plus the evidence, good and bad
(Josang and Ismail, "The Beta Reputation System", 2002). Evidence halves every `half_life_h`, and no more
than `max_evidence` of it counts at once, so that ten thousand good sessions do not pay for a bad week.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .score import Score


@dataclass(frozen=True, slots=True)
class LedgerConfig:
    """Priors and forgetting."""

    reliability_prior: tuple[float, float] = (4.0, 1.0)  # good and bad sessions a newcomer is credited with
    integrity_prior: tuple[float, float] = (1.0, 1.0)  # passed and failed audits, likewise
    half_life_h: float = 72.0  # hours until evidence counts half
    max_evidence: float = 100.0  # sessions or audits that count at most
    max_peers: int = 20_000  # peers remembered; beyond that the longest unseen are forgotten


@dataclass(slots=True)
class Evidence:
    """Good and bad observations, each worth what is left of it at `as_of_s`."""

    good: float = 0.0
    bad: float = 0.0
    as_of_s: float = 0.0

    def decay(self, now: float, half_life_h: float) -> None:
        """Let the evidence age until `now`; time does not run backwards."""
        if now > self.as_of_s:
            left = 0.5 ** ((now - self.as_of_s) / (3600 * half_life_h))
            self.good *= left
            self.bad *= left
            self.as_of_s = now

    def limit(self, most: float) -> None:
        """Scale both counts down so that they sum up to `most` at most."""
        total = self.good + self.bad
        if total > most:
            self.good *= most / total
            self.bad *= most / total

    def mean(self, prior: tuple[float, float]) -> float:
        """The posterior mean: the expected share of good observations."""
        good, bad = prior
        return (good + self.good) / (good + self.good + bad + self.bad)


@dataclass(slots=True)
class _Account:
    reliability: Evidence = field(default_factory=Evidence)
    integrity: Evidence = field(default_factory=Evidence)


class Ledger:
    """Every peer's evidence, in memory; a `ReputationView`.

    Its time is that of the latest event it was told of, in seconds of any clock that only runs forward.

    Args:
        banned: Peers the user wants nothing to do with.
        vouched: Peers the user answers for, such as machines of their own.
    """

    def __init__(
        self,
        config: LedgerConfig | None = None,
        *,
        banned: Iterable[str] = (),
        vouched: Iterable[str] = (),
    ) -> None:
        self._config = config or LedgerConfig()
        self._accounts: dict[str, _Account] = {}
        self._banned = set(banned)
        self._vouched = set(vouched)
        self._now = 0.0

    def score(self, peer_id: str) -> Score:
        """The peer's posterior means as of the ledger's time; integrity is 1 for whom the user vouches."""
        account = self._accounts.get(peer_id, _Account())
        reliability = self._mean(account.reliability, self._config.reliability_prior)
        integrity = self._mean(account.integrity, self._config.integrity_prior)
        return Score(integrity=1.0 if peer_id in self._vouched else integrity, reliability=reliability)

    def is_banned(self, peer_id: str) -> bool:
        """Whether the user banned the peer."""
        return peer_id in self._banned

    def record_success(self, peer_id: str, now: float) -> None:
        """The peer stayed until a session was done."""
        self._observe(peer_id, now, good=1.0, bad=0.0)

    def record_failure(self, peer_id: str, now: float) -> None:
        """The peer refused, vanished or broke protocol."""
        self._observe(peer_id, now, good=0.0, bad=1.0)

    def advance(self, now: float) -> None:
        """Let time pass without an event; the past counts less after it."""
        self._now = max(self._now, now)

    def ban(self, peer_id: str) -> None:
        """Use the peer no more, whatever it did."""
        self._banned.add(peer_id)
        self._vouched.discard(peer_id)

    def forgive(self, peer_id: str) -> None:
        """Make the peer a newcomer: no ban, no evidence."""
        self._banned.discard(peer_id)
        self._accounts.pop(peer_id, None)

    def vouch(self, peer_id: str) -> None:
        """Take the peer's integrity for granted."""
        self._vouched.add(peer_id)
        self._banned.discard(peer_id)

    def _mean(self, evidence: Evidence, prior: tuple[float, float]) -> float:
        aged = Evidence(evidence.good, evidence.bad, evidence.as_of_s)
        aged.decay(self._now, self._config.half_life_h)
        return aged.mean(prior)

    def _observe(self, peer_id: str, now: float, *, good: float, bad: float) -> None:
        self.advance(now)
        # Taken out and put back: the dict's order is that of the last event.
        account = self._accounts.pop(peer_id, None) or _Account()
        self._accounts[peer_id] = account
        evidence = account.reliability
        evidence.decay(self._now, self._config.half_life_h)
        evidence.good += good
        evidence.bad += bad
        evidence.limit(self._config.max_evidence)
        if len(self._accounts) > self._config.max_peers:
            del self._accounts[next(iter(self._accounts))]
