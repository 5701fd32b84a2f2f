"""Account of one peer: everything observed of it, as a pure function of events.

Everything here is pure: an account and an event give an account. So an event that one process saw can be
applied to what another process has written meanwhile, and nothing is lost or counted twice.

Integrity is a Beta posterior over audits. A pass makes alpha <- 1 + (alpha - 1) m + 1 and
beta <- 1 + (beta - 1) m, a confirmed failure adds `fail_weight` to beta (Josang and Ismail, "The Beta
Reputation System", 2002, forgetting per observation). Reliability is one over sessions, which halve with
time instead: a peer that was offline last month may have a better line now, but honesty does not wear off.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from .config import LedgerConfig
from .small_lies import Sample, SmallLies

MAX_REASON = 240  # characters of a note
MAX_NOTES = 8
MAX_RANGES = 4  # of addresses

_Count: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
_Tally: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
_Pseudo: TypeAlias = Annotated[float, msgspec.Meta(ge=1, le=1e6)]
_Share: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Time: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e11)]
_Reason: TypeAlias = Annotated[str, msgspec.Meta(max_length=MAX_REASON)]

AuditResult: TypeAlias = Literal["pass", "fail", "suspect", "inconclusive"]


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something worth telling people about a peer."""

    at: _Time
    text: _Reason


class Ban(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Reason of a ban: `by` the user, its audits' mean, or a fraud proof."""

    at: _Time
    by: Literal["user", "audits", "proof"]
    why: _Reason


class Account(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One peer's record. Immutable; the functions below return a changed copy.

    Attributes:
        alpha, beta: The Beta posterior of own audits; both 1 for a newcomer.
        suspicion: Running mean of SUSPECT verdicts, 0..1.
        small_lies: What its audits come to together, see `small_lies`.
        evasion: Running mean of audits that it did not pass for a reason that lay with it, or that three
            others agree on, 0..1.
        good, bad: Sessions that went well and failed, each worth what is left of it at `as_of`.
        passed, failed, suspected, inconclusive, withheld: Audits ever, by verdict.
        sessions, failures: Sessions ever, and those the peer ended.
        proofs_verified, proofs_false: What came of the fraud proofs that this peer sent us.
        proofs_useful: Those of the verified ones that were about peers observed here.
        forgiven_at: Bans from before do not count.
        ranges: Of the addresses where it was found, once it had been banned.
    """

    alpha: _Pseudo = 1.0
    beta: _Pseudo = 1.0
    suspicion: _Share = 0.0
    small_lies: SmallLies = SmallLies()
    evasion: _Share = 0.0
    good: _Count = 0.0
    bad: _Count = 0.0
    as_of: _Time = 0.0
    passed: _Tally = 0
    failed: _Tally = 0
    suspected: _Tally = 0
    inconclusive: _Tally = 0
    withheld: _Tally = 0
    sessions: _Tally = 0
    failures: _Tally = 0
    proofs_verified: _Tally = 0
    proofs_false: _Tally = 0
    proofs_useful: _Tally = 0
    first_seen: _Time = 0.0
    last_seen: _Time = 0.0
    last_audit: _Time = 0.0
    forgiven_at: _Time = 0.0
    vouched: bool = False
    ban: Ban | None = None
    notes: Annotated[tuple[Note, ...], msgspec.Meta(max_length=MAX_NOTES)] = ()
    ranges: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=256)], ...], msgspec.Meta(max_length=MAX_RANGES)
    ] = ()

    @property
    def audits(self) -> int:
        """Audits that said something, ever."""
        return self.passed + self.failed

    @property
    def evidence(self) -> float:
        """Audits that still count, each failure for several."""
        return self.alpha + self.beta - 2

    @property
    def integrity_mean(self) -> float:
        """The posterior mean of own audits."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def is_met(self) -> bool:
        """True if this process or its user has something to say of the peer that nobody told them."""
        observed = self.sessions or self.passed or self.failed or self.suspected or self.inconclusive
        by_user = self.vouched or self.forgiven_at or (self.ban is not None and self.ban.by != "proof")
        return bool(observed or by_user)

    @property
    def latest(self) -> float:
        """The latest time in the record."""
        banned_at = 0.0 if self.ban is None else self.ban.at
        return max(self.as_of, self.last_seen, self.last_audit, self.forgiven_at, banned_at)

    def is_newcomer(self, config: LedgerConfig) -> bool:
        """True if there were too few audits to tell, none failed, and it has not got around them."""
        is_new = self.failed == 0 and not self.vouched and self.passed < config.newcomer_audits
        return is_new and self.beta < config.evader_beta

    def reliability(self, now: float, config: LedgerConfig) -> tuple[float, float]:
        """The posterior mean over sessions as of `now`, and two standard deviations more, 1 at most."""
        good, bad = config.reliability_prior
        left = _left(now - self.as_of, config)
        good, bad = good + self.good * left, bad + self.bad * left
        mean = good / (good + bad)
        deviation = (mean * (1 - mean) / (good + bad + 1)) ** 0.5
        return mean, min(1.0, mean + 2 * deviation)


NEWCOMER = Account()


def after_session(
    account: Account, ok: bool, now: float, why: str, config: LedgerConfig, share: float = 1.0
) -> Account:
    """The peer stayed until a session was done, or ended it.

    Args:
        share: Of the fault, as far as it is known to be the peer's.
    """
    account = seen(account, now)
    now = max(now, account.as_of)  # time does not run backwards
    left = _left(now - account.as_of, config)
    good, bad = account.good * left + ok * share, account.bad * left + (not ok) * share
    scale = min(1.0, config.max_evidence / (good + bad)) if good + bad else 1.0
    account = _changed(
        account,
        good=good * scale,
        bad=bad * scale,
        as_of=now,
        sessions=account.sessions + 1,
        failures=account.failures + (not ok),
    )
    return noted(account, now, why) if why else account


def after_audit(
    account: Account,
    result: AuditResult,
    now: float,
    why: str,
    config: LedgerConfig,
    *,
    contradicted: bool = False,
    accused: bool = False,
) -> Account:
    """An audit of the peer came out. `fail` is a confirmed one; one still to be confirmed is `suspect`.

    Args:
        contradicted: It is suspect because three other peers agree on another output, where the blocks do not
            fit here. That proves nothing, as they may be one person. If it repeats with whomever is asked, it
            costs integrity as evidence does that is withheld again and again; it bans nobody.
        accused: What they contradict had been published as a proof of fraud, so that others have found the
            same. It costs what a failed audit does, and bans nobody either.
    """
    account = _changed(seen(account, now), last_audit=max(now, account.last_audit))
    memory, keep = config.audit_memory, config.suspicion_memory
    if contradicted:
        weight = config.fail_weight if accused else config.contradiction_weight
        account = _changed(account, beta=min(account.beta + weight, 1e6))
    if contradicted:
        account = _evaded(account, config)
    elif result != "inconclusive":
        account = _changed(account, evasion=account.evasion * config.evasion_memory)
    match result:
        case "pass":
            account = _changed(
                account,
                alpha=2 + (account.alpha - 1) * memory,
                beta=1 + (account.beta - 1) * memory,
                suspicion=account.suspicion * keep,
                passed=account.passed + 1,
            )
        case "fail":
            account = _changed(
                account,
                beta=min(account.beta + config.fail_weight, 1e6),
                failed=account.failed + 1,
            )
            account = noted(account, now, why or "an audit failed and was confirmed")
            if account.integrity_mean < config.ban_below:
                account = banned(account, now, "audits", why or "its audits failed")
        case "suspect":
            account = _changed(
                account,
                suspicion=account.suspicion * keep + (1 - keep),
                suspected=account.suspected + 1,
            )
            account = noted(account, now, why) if why else account
        case "inconclusive":
            account = _changed(account, inconclusive=account.inconclusive + 1)
    return account


def after_small_lies(
    account: Account, sample: Sample, now: float, config: LedgerConfig, *, is_short: bool = False
) -> Account:
    """An audit was measured, whatever its verdict: what all of them come to may be too much.

    Args:
        is_short: The session had too few tokens for a verdict. Such sessions pass together, once they have
            tokens enough: else a peer that is asked for short answers only would be a newcomer for ever.
    """
    before = account.small_lies
    state = before.after(sample)
    account = _changed(account, small_lies=state)
    if is_short and state.are_clean_since(before):
        account = after_audit(account, "pass", now, "", config)
    if state.is_guilty and not account.vouched:
        why = "small deviations in many sessions add up to more than honest peers' ever do"
        account = _changed(
            account, beta=min(account.beta + config.fail_weight, 1e6), failed=account.failed + 1
        )
        account = banned(account, now, "audits", why)
    return account


def after_withholding(account: Account, now: float, why: str, config: LedgerConfig) -> Account:
    """An audit had no result, and that lay with the peer: its evidence was withheld, late, or did not fit.

    Its reliability suffers at once. Its integrity does when that repeats, each time by as much of an audit as
    were like that of late: an honest peer restarts or drops evidence now and then, and passes in between.
    Such audits are no proof, so they alone ban nobody.
    """
    account = after_session(account, False, now, why or "withheld the evidence of an audit", config)
    return _changed(
        _evaded(account, config),
        withheld=account.withheld + 1,
        inconclusive=account.inconclusive + 1,
    )


def after_proof(account: Account, verified: bool, now: float, *, useful: bool = True) -> Account:
    """A fraud proof that the peer sent was checked.

    Args:
        useful: Whether it was about a peer that was observed here.
    """
    account = seen(account, now)
    if verified:
        return _changed(
            account,
            proofs_verified=account.proofs_verified + 1,
            proofs_useful=account.proofs_useful + useful,
        )
    account = _changed(account, proofs_false=account.proofs_false + 1)
    return noted(account, now, "sent a fraud proof that proves nothing")


def banned(account: Account, now: float, by: Literal["user", "audits", "proof"], why: str) -> Account:
    """The peer is not to be used; an earlier ban keeps its reason unless the user gives another."""
    if account.ban is not None and by != "user":
        return account
    why = _cut(why)
    return noted(_changed(account, ban=Ban(now, by, why), vouched=False), now, f"banned: {why}")


def located(account: Account, ranges: tuple[str, ...]) -> Account:
    """A banned peer was found at addresses of these ranges."""
    return account if account.ban is None else _changed(account, ranges=ranges)


def forgiven(account: Account, now: float) -> Account:
    """A newcomer again: no ban, no evidence; what it did stays in the notes."""
    blank = Account(first_seen=account.first_seen, last_seen=account.last_seen, forgiven_at=now)
    return noted(_changed(blank, notes=account.notes), now, "forgiven")


def vouched_for(account: Account, now: float) -> Account:
    """The user answers for the peer."""
    account = _changed(account, vouched=True, ban=None, forgiven_at=now, ranges=())
    return noted(account, now, "vouched for")


def merged(ours: Account, theirs: Account) -> Account:
    """Union of both records. Merging the same one twice changes nothing, so nothing is counted twice.

    Of each kind of evidence the record with more of it counts. The latest word of a user on bans holds.
    """
    audits = theirs if theirs.audits > ours.audits else ours
    sessions = theirs if theirs.sessions > ours.sessions else ours
    forgiven_at = max(ours.forgiven_at, theirs.forgiven_at)
    bans = [ban for ban in (ours.ban, theirs.ban) if ban is not None and ban.at >= forgiven_at]
    notes = sorted({*ours.notes, *theirs.notes}, key=lambda note: (note.at, note.text))
    seen_first = [at for at in (ours.first_seen, theirs.first_seen) if at]
    return Account(
        **_fields(
            audits, "alpha", "beta", "suspicion", "small_lies", "passed", "failed", "suspected", "last_audit"
        ),
        **_fields(audits, "inconclusive", "withheld", "evasion"),
        **_fields(sessions, "good", "bad", "as_of", "sessions", "failures"),
        proofs_verified=max(ours.proofs_verified, theirs.proofs_verified),
        proofs_false=max(ours.proofs_false, theirs.proofs_false),
        proofs_useful=max(ours.proofs_useful, theirs.proofs_useful),
        first_seen=min(seen_first, default=0.0),
        last_seen=max(ours.last_seen, theirs.last_seen),
        forgiven_at=forgiven_at,
        vouched=(ours.vouched or theirs.vouched) and not bans,
        ban=max(bans, key=lambda ban: (ban.at, ban.by, ban.why), default=None),
        notes=tuple(notes[-MAX_NOTES:]),
        ranges=tuple(sorted({*ours.ranges, *theirs.ranges})[:MAX_RANGES]) if bans else (),
    )


def not_after(account: Account, now: float) -> Account:
    """The record with no time later than `now`: a file may hold any, and the future never ages."""
    times = {name: min(getattr(account, name), now) for name in _TIMES}
    ban = account.ban and msgspec.structs.replace(account.ban, at=min(account.ban.at, now))
    notes = tuple(msgspec.structs.replace(note, at=min(note.at, now)) for note in account.notes)
    return msgspec.structs.replace(account, **times, ban=ban, notes=notes)


def seen(account: Account, now: float) -> Account:
    """The peer was met at `now`."""
    return _changed(account, first_seen=account.first_seen or now, last_seen=max(now, account.last_seen))


def noted(account: Account, now: float, text: str) -> Account:
    """The record with one more line for people; the oldest go."""
    return _changed(account, notes=(*account.notes, Note(now, _cut(text)))[-MAX_NOTES:])


_TIMES = ("as_of", "first_seen", "last_seen", "last_audit", "forgiven_at")


def _evaded(account: Account, config: LedgerConfig) -> Account:
    """An audit that the peer did not pass, without a proof: it costs as much as were like that of late."""
    keep = config.evasion_memory
    return _changed(
        account,
        beta=min(account.beta + account.evasion, 1e6),
        evasion=account.evasion * keep + (1 - keep),
    )


def _left(seconds: float, config: LedgerConfig) -> float:
    return float(0.5 ** (max(seconds, 0.0) / (3600 * config.half_life_h)))


def _changed(account: Account, **fields: object) -> Account:
    return msgspec.structs.replace(account, **fields)


def _fields(account: Account, *names: str) -> dict[str, Any]:
    return {name: getattr(account, name) for name in names}


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 3]}..."
