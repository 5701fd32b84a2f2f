"""Export and import of a ledger as a JSON file.

What comes in is held to the same bounds as the ledger's own file, and merged into what is known: nothing is
overwritten, and importing a file twice changes nothing. Its bans and audits become one's own: import only
what one would have seen oneself. Attestations are how strangers are heard (attestation.py).
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from p2pinfer.errors import LocalError
from p2pinfer.text_files import decode_text

from .account import Account
from .attestation import PeerId
from .ledger import Ledger

VERSION: Final = 1
MAX_EXPORT_BYTES: Final = 64 << 20  # some 20,000 peers take 20 MB
MAX_EXPORTED_PEERS: Final = 100_000


class _Export(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    p2pinfer_ledger: Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)]
    peers: Annotated[dict[PeerId, Account], msgspec.Meta(max_length=MAX_EXPORTED_PEERS)]


def export_ledger(ledger: Ledger) -> bytes:
    """Every peer's record as JSON."""
    return msgspec.json.format(msgspec.json.encode(_Export(VERSION, ledger.peers())), indent=1) + b"\n"


def import_ledger(ledger: Ledger, exported: bytes, now: float) -> int:
    """Merge an export into `ledger`, and return how many peers it had.

    Raises:
        LocalError: It is no export of a ledger; nothing was imported.
    """
    if len(exported) > MAX_EXPORT_BYTES:
        raise LocalError(f"an export of {len(exported)} bytes; {MAX_EXPORT_BYTES} are allowed")
    try:
        decoded = msgspec.json.decode(decode_text(exported), type=_Export)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
        raise LocalError(f"this is not an exported ledger: {exc}") from exc
    for peer_id, record in decoded.peers.items():
        ledger.merge(peer_id, record, now)
    return len(decoded.peers)
