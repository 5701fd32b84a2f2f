"""The error that the failures of a peer's addresses amount to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from p2pinfer.errors import NotAdmitted, NotDialled, PeerUnreachable
from p2pinfer.node.concurrency.nurseries import innermost
from p2pinfer.node.transport.private_network import StrangerMet


def dial_failure(
    peer_id: str, addrs: Sequence[str], errors: Mapping[str, Exception], within_s: float
) -> PeerUnreachable:
    """The error for a peer that none of `addrs` led to; those without one of their own were silent."""
    silent = f"no answer within {within_s:g} s"
    tried = "; ".join(
        f"{address}: {innermost(errors[address]) if address in errors else silent}" for address in addrs
    )
    message = f"peer {peer_id} cannot be reached: {tried}"
    if any(_is_stranger(error) for error in errors.values()):
        return NotAdmitted(message, peer_id)
    left_out = [error for error in errors.values() if isinstance(error, NotDialled)]
    if len(left_out) == len(addrs):
        return NotDialled(message, peer_id, is_passing=any(error.is_passing for error in left_out))
    return PeerUnreachable(message, peer_id)


def _is_stranger(error: BaseException | None) -> bool:
    return error is not None and (isinstance(error, StrangerMet) or _is_stranger(error.__cause__))
