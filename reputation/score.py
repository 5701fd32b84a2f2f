"""Scores of a peer: integrity and reliability, two numbers with different meanings."""

from __future__ import annotations

from dataclasses import dataclass

from .account import Account
from .beta import quantile
from .config import LedgerConfig


@dataclass(frozen=True, slots=True)
class Score:
    """Prediction for a peer's next session, from its past.

    Attributes:
        integrity: What we are 95 % sure of that it computes as it was asked to, 0..1: the 5 % quantile of
            what audits say, so a newcomer scores low until it has been checked.
        reliability: How probably it stays until the session is done, 0..1.
        is_newcomer: Too few audits to tell, and none of them failed.
        at_best: What both may turn out to be with every doubt in the peer's favour; None where no doubt is
            known. Exploring goes by it.
        is_stranger: It has passed no audit yet.
        is_shunned: It got around audits, or was outvoted, about as often as it passed: to be used only where
            nobody else serves its blocks.
    """

    integrity: float
    reliability: float
    is_newcomer: bool = False
    at_best: Score | None = None
    is_stranger: bool = False
    is_shunned: bool = False


def score_of(account: Account, heard: tuple[float, float], now: float, config: LedgerConfig) -> Score:
    """A peer's score as of `now`; a newcomer's integrity is the prior's 5 % quantile.

    Args:
        heard: Good and bad audits that the peer is credited with on the word of others.
    """
    reliability, likely = account.reliability(now, config)
    if account.vouched:
        return Score(1.0, reliability, at_best=Score(1.0, likely))
    good, bad = heard
    # Rounded, or no two calls would share a quantile that was reckoned before.
    alpha, beta = account.alpha + round(good, 1), account.beta + round(bad, 1)
    doubt = config.quantile
    is_doubted = account.failed > 0 or account.beta >= config.evader_beta
    at_best = quantile(1 - doubt, alpha, beta) if is_doubted else 1.0
    return Score(
        quantile(doubt, alpha, beta),
        reliability,
        account.is_newcomer(config),
        Score(at_best, likely, is_shunned=at_best < config.shunned_at_best),
        is_stranger=not account.passed,
        is_shunned=is_shunned(account, config),
    )


def is_shunned(account: Account, config: LedgerConfig) -> bool:
    """True if a peer got around audits, or was outvoted, about as often as it passed."""
    is_evader = account.beta >= config.evader_beta and not account.vouched
    return is_evader and account.integrity_mean < config.shunned_below


def audit_probability(account: Account, config: LedgerConfig) -> float:
    """Probability with which to audit a peer's work in a session, on a coin it cannot see.

    `min + (1 - integrity)^4`, of own audits only: praise by others lowers nobody's guard. Newcomers are
    audited more, and so is who was SUSPECT lately, deviates a little too often, or gets around audits. With
    the square, audits of short sessions of a small model came to more than 2 % of what serving them costs
    (`benchmarks/liars.py`).
    """
    if account.vouched:
        return config.min_audit_probability
    doubt = 1.0 - quantile(config.quantile, account.alpha, account.beta)
    probability = config.min_audit_probability + doubt**4 + account.suspicion
    probability += account.small_lies.suspicion + account.evasion
    if account.is_newcomer(config):
        probability = max(probability, config.newcomer_audit_probability)
    return min(probability, 1.0)


def full_audit_probability(account: Account, config: LedgerConfig) -> float:
    """Probability with which an audit of the peer measures, instead of glancing, at its outputs.

    Surely for the first ones and wherever there is a doubt, so that small lies add up as fast as they can.
    """
    if account.passed < config.first_full_audits or is_doubtful(account):
        return 1.0
    return config.full_audit_share


def is_doubtful(account: Account) -> bool:
    """True if some audit said more against the peer than those of honest peers usually do."""
    unproven = account.suspicion > 0.01 or account.small_lies.suspicion > 0 or account.evasion > 0.01
    return unproven or account.failed > 0
