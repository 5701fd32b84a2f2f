"""Tally of a client's audits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from p2pinfer.reputation.verdict import Verdict


@dataclass(frozen=True, slots=True)
class AuditTally:
    """Results of all audits so far."""

    done: int = 0
    passed: int = 0
    failed: int = 0
    suspect: int = 0
    inconclusive: int = 0

    def plus(self, verdict: Verdict) -> AuditTally:
        """One audit more."""
        name = {"pass": "passed", "fail": "failed"}.get(verdict.value, verdict.value)
        return replace(self, **{name: getattr(self, name) + 1, "done": self.done + 1})
