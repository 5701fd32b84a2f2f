"""Verdicts by name, and a signature that tests can make and break."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from p2pinfer.reputation.attestation import Attestation, Opinion, seal_attestation
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.verdict import Verdict


def signer(author: str) -> Callable[[bytes], bytes]:
    return lambda payload: hashlib.blake2b(payload, key=author.encode(), digest_size=64).digest()


def verify(author: str, payload: bytes, signature: bytes) -> bool:
    return signer(author)(payload) == signature


def attestation(author: str, means: dict[str, float], audits: float = 20.0, made_at: float = 1.0) -> bytes:
    opinions = tuple(Opinion(peer_id, mean, audits) for peer_id, mean in means.items())
    return seal_attestation(Attestation(1, author, made_at, opinions), signer(author))


def audit(ledger: Ledger, peer_id: str, verdict: Verdict, times: int = 1, now: float = 1.0) -> None:
    for _ in range(times):
        ledger.record_audit(peer_id, verdict, now)
