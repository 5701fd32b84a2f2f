"""Settings of reputation; the only place where these defaults live."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LedgerConfig:
    """Settings of the scores, and of how much is remembered."""

    reliability_prior: tuple[float, float] = (9.5, 0.5)  # good and bad sessions a newcomer is credited with
    half_life_h: float = 72.0  # hours until what was seen of a peer's reliability counts half
    max_evidence: float = 100.0  # sessions that count at most
    audit_memory: float = 0.999  # what older audits keep of their weight with every further one
    fail_weight: float = 10.0  # audits that one confirmed failure counts as
    contradiction_weight: float = 4.0  # audits that one counts as in which three others contradict the peer
    quantile: float = 0.05  # the share of doubt that integrity grants
    ban_below: float = 0.3  # a peer whose own audits' mean is lower is banned
    min_audit_probability: float = 0.03  # nobody is trusted so far that nobody looks
    newcomer_audits: int = 8  # a peer with fewer audits is a newcomer
    newcomer_audit_probability: float = 1.0  # at least, while it is one
    first_full_audits: int = 1  # of a peer, that measure its outputs
    full_audit_share: float = 0.1  # of its later ones; the others glance at them
    suspicion_memory: float = 0.9  # what the running mean of SUSPECT verdicts keeps with every audit
    evasion_memory: float = 0.7  # what the running mean of evaded audits keeps with every audit
    evader_beta: float = 2.4  # bad audits from which a peer is no newcomer; four evaded in a row
    # mean of the integrity of who got around audits, or was outvoted, below which others are preferred to it
    shunned_below: float = 0.6
    shunned_at_best: float = 0.4  # integrity that it may have at best, below which it is not tried again
    attested_cap: float = 20.0  # audits that all that others say of a peer counts as at most
    min_overlap: int = 3  # peers of whom both know something before an attester has weight
    attestation_ttl_s: float = 7 * 86400.0  # seconds for which an attestation counts
    max_attesters: int = 256  # of whom an attestation is kept
    proofs_per_hour: float = 6.0  # of one sender in good standing
    # of all strangers together, about peers met here and as many about others; half as many of known senders
    max_proofs_per_hour: float = 60.0
    least_proofs_per_hour: float = 6.0  # of all strangers together, however many of theirs were false
    spoilt_h: float = 168.0  # hours for which newcomers from a banned peer's address range are not tried
    max_proofs: int = 10_000  # content addresses remembered
    max_peers: int = (
        20_000  # peers met here that are remembered; beyond that the longest unseen are forgotten
    )
    max_told_bans: int = 10_000  # peers banned on a proof and never met; beyond that no more are taken
    told_ban_h: float = 720.0  # hours after which such a ban may go for a younger one
    max_senders: int = 2_000  # peers known only by proofs that they sent
