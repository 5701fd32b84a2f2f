"""Attestations: opinions of peers about each other, and how much each counts.

An attestation is one signed record: its author's own audits of some peers, as a mean and a count. It says
nothing by itself. An author has weight only once at least `min_overlap` peers were audited both by it and by
us, and then `max(0, 1 - 2.5 * mean |difference of means|)`: who saw what we saw may have seen more, who
praises those we caught is not heard (the deviation test of Buchegger and Le Boudec, 2004). All that others
say of a peer counts as no more audits than we made of it ourselves, and as `attested_cap` at most. So a
crowd that says the same moves a ranking a little, and nobody whom we never audited.

On the wire: a MessagePack array `[version, author, made_at, [[peer, mean, audits], ...], signature]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Final, TypeAlias

import msgspec

from p2pinfer.errors import ProtocolViolation

from .account import Account
from .config import LedgerConfig

VERSION: Final = 1
MAX_ATTESTATION_BYTES: Final = 32_768
MAX_OPINIONS: Final = 256
_SLOPE: Final = 2.5  # a mean difference of 0.4 silences an author
_DOMAIN: Final = b"p2pinfer/1/attestation\0"
_CLOCK_SKEW_S: Final = 3600.0  # how far another peer's clock may be ahead

PeerId: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,128}\Z")]
Sign: TypeAlias = Callable[[bytes], bytes]
Verify: TypeAlias = Callable[[str, bytes, bytes], bool]  # peer id, payload, signature


class Opinion(msgspec.Struct, frozen=True, array_like=True):
    """Result of its author's audits of one peer."""

    peer_id: PeerId
    mean: Annotated[float, msgspec.Meta(ge=0, le=1)]
    audits: Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class Attestation(msgspec.Struct, frozen=True, array_like=True):
    """One author's opinions; a later one replaces it."""

    version: Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)]
    author: PeerId
    made_at: Annotated[float, msgspec.Meta(ge=0, le=1e11)]  # the author's clock, seconds since 1970
    opinions: Annotated[tuple[Opinion, ...], msgspec.Meta(max_length=MAX_OPINIONS)]


class _Sealed(msgspec.Struct, frozen=True, array_like=True):
    payload: Annotated[bytes, msgspec.Meta(max_length=MAX_ATTESTATION_BYTES)]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Attestation)
_sealed_decoder: Final = msgspec.msgpack.Decoder(_Sealed)


def own_attestation(author: str, accounts: Mapping[str, Account], now: float) -> Attestation:
    """Our own attestation: own audits and nothing that we were told. The best known come first."""
    audited = [(peer_id, account) for peer_id, account in accounts.items() if account.evidence > 0]
    audited.sort(key=lambda each: (-each[1].evidence, each[0]))
    opinions = tuple(
        Opinion(peer_id, account.integrity_mean, account.evidence)
        for peer_id, account in audited[:MAX_OPINIONS]
        if peer_id != author
    )
    return Attestation(VERSION, author, now, opinions)


def seal_attestation(attestation: Attestation, sign: Sign) -> bytes:
    """The attestation's bytes, signed by its author."""
    payload = _encoder.encode(attestation)
    return _encoder.encode(_Sealed(payload, sign(_DOMAIN + payload)))


def open_attestation(record: bytes, verify: Verify, now: float) -> Attestation:
    """The attestation in `record`.

    Args:
        verify: Whether a signature over a payload is that of a peer.

    Raises:
        ProtocolViolation: It is malformed, too large, of the future, or not signed by its author.
    """
    if len(record) > MAX_ATTESTATION_BYTES:
        raise ProtocolViolation(f"attestation of {len(record)} bytes; {MAX_ATTESTATION_BYTES} are allowed")
    try:
        sealed = _sealed_decoder.decode(record)
        attestation = _decoder.decode(sealed.payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation(f"malformed attestation: {exc}") from exc
    if not verify(attestation.author, _DOMAIN + sealed.payload, sealed.signature):
        raise ProtocolViolation("an attestation whose signature is not its author's")
    if attestation.made_at > now + _CLOCK_SKEW_S:
        raise ProtocolViolation("an attestation from the future")
    return attestation


def weight(attestation: Attestation, accounts: Mapping[str, Account], config: LedgerConfig) -> float:
    """Weight of the author's word, 0..1, by how it compares with what we saw ourselves."""
    differences = [
        abs(accounts[opinion.peer_id].integrity_mean - opinion.mean)
        for opinion in attestation.opinions
        if opinion.audits > 0
        and opinion.peer_id in accounts
        and accounts[opinion.peer_id].evidence > 0
        and opinion.peer_id != attestation.author
    ]
    if len(differences) < config.min_overlap:
        return 0.0
    return max(0.0, 1.0 - _SLOPE * sum(differences) / len(differences))


def attested_evidence(
    attestations: Iterable[Attestation], accounts: Mapping[str, Account], config: LedgerConfig
) -> dict[str, tuple[float, float]]:
    """Good and bad audits that each peer is credited with on the word of others, within the caps.

    Peers of whom we have no evidence of our own are not in it.
    """
    totals: dict[str, tuple[float, float]] = {}
    for attestation in attestations:
        believed = weight(attestation, accounts, config)
        if not believed:
            continue
        for opinion in attestation.opinions:
            account = accounts.get(opinion.peer_id)
            if account is None or opinion.peer_id == attestation.author:
                continue
            # No author alone reaches the cap by claiming a million audits.
            audits = believed * min(opinion.audits, config.attested_cap)
            good, bad = totals.get(opinion.peer_id, (0.0, 0.0))
            totals[opinion.peer_id] = (good + audits * opinion.mean, bad + audits * (1 - opinion.mean))
    return {peer_id: _capped(*total, accounts[peer_id], config) for peer_id, total in totals.items()}


def _capped(good: float, bad: float, account: Account, config: LedgerConfig) -> tuple[float, float]:
    most = min(account.evidence, config.attested_cap)
    scale = min(1.0, most / (good + bad)) if good + bad > 0 else 0.0
    return good * scale, bad * scale
