"""Explanation of a peer's scores in plain words."""

from __future__ import annotations

import time

from .account import NEWCOMER, Account, Ban
from .config import LedgerConfig
from .score import Score, audit_probability, is_shunned


def explain(account: Account, score: Score, heard: tuple[float, float], config: LedgerConfig) -> list[str]:
    """One sentence a line: standing, audits, sessions, hearsay, proofs, what happened.

    Args:
        heard: Good and bad audits that the peer is credited with on the word of others.
    """
    lines = [_standing(account, config), _audits(account, score.integrity, config)]
    if account.suspicion > 0.01:
        lines.append(
            f"Of its latest audits, {account.suspicion:.0%} were suspect, which proves nothing; "
            f"it is audited more often."
        )
    if account.small_lies.suspicion > 0.01 and not account.ban:
        lines.append(
            f"Its small deviations come to {account.small_lies.suspicion:.0%} of what bans a peer; "
            f"it is audited more often."
        )
    lines += [_sessions(account, score.reliability)]
    good, bad = heard
    if good + bad >= 0.05:
        lines.append(
            f"Others whose audits agree with yours count as {good + bad:.1f} more audits, "
            f"{good / (good + bad):.0%} of them good."
        )
    if account.proofs_verified or account.proofs_false:
        lines.append(
            f"It sent {_count(account.proofs_verified, 'fraud proof')} that held and "
            f"{account.proofs_false} that did not."
        )
    if not account.ban:
        rate = audit_probability(account, config)
        lines.append(f"Its work is audited in at least {rate:.0%} of the sessions it takes part in.")
    return lines + [f"{moment(note.at)}  {note.text}" for note in account.notes]


def standing(account: Account, config: LedgerConfig) -> str:
    """The peer's standing in a word or two, for a table."""
    if account.ban is not None:
        return {"user": "banned by you", "audits": "banned by audits", "proof": "banned by proof"}[
            account.ban.by
        ]
    if account.vouched:
        return "vouched for"
    if account.failed:
        return "failed audits"
    if is_shunned(account, config):
        return "avoided"
    return "newcomer" if account.is_newcomer(config) else "audited"


def moment(at: float) -> str:
    """A point in time for people, or a dash for none."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) if at > 0 else "-"


def _standing(account: Account, config: LedgerConfig) -> str:
    if account.ban is not None:
        return _ban(account.ban)
    if account.vouched:
        return "You vouched for it, so its integrity is taken for granted."
    if account == NEWCOMER:
        return "Nothing is known of it: it never worked for you."
    if account.failed:
        return "It failed audits, but has passed too many to be banned for that alone."
    if is_shunned(account, config):
        return "It got around audits, or was outvoted, too often: it is used only where nobody else is."
    if account.is_newcomer(config):
        wanted = config.newcomer_audits
        return f"It is a newcomer: {account.passed} of the {wanted} audits after which it no longer is."
    return "It is in good standing."


def _ban(ban: Ban) -> str:
    when = f" on {moment(ban.at)}" if ban.at > 0 else ""
    match ban.by:
        case "user":
            return f"You banned it{when}: {ban.why}."
        case "audits":
            return f"It was banned{when} because of its audits: {ban.why}."
        case "proof":
            return f"It was banned{when}: {ban.why}."


def _audits(account: Account, integrity: float, config: LedgerConfig) -> str:
    if not account.audits:
        return f"None of its work was audited with a result, so its integrity is {integrity:.2f}."
    rest = ""
    if account.suspected or account.inconclusive:
        rest = f" ({account.suspected} more were suspect, {account.inconclusive} inconclusive)"
    return (
        f"Of {_count(account.audits, 'audit')}{rest} it passed {account.passed}: with "
        f"{1 - config.quantile:.0%} confidence at least {integrity:.0%} of its work is right "
        f"(integrity {integrity:.2f})."
    )


def _sessions(account: Account, reliability: float) -> str:
    if not account.sessions:
        return f"It took part in no session yet; its reliability is taken to be {reliability:.2f}."
    stayed = account.sessions - account.failures
    return (
        f"Of {_count(account.sessions, 'session')} it saw {stayed} through; the latest count most "
        f"(reliability {reliability:.2f})."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
