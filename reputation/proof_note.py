"""Notes of fraud proofs: what a ledger keeps, so that each is checked once and who lies in them is known."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

ProofState: TypeAlias = Literal["seen", "verified", "false"]


class ProofNote(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fate of one proof."""

    accused: Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,128}\Z")]
    sender: Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{0,128}\Z")]  # empty: made here
    state: ProofState
    at: Annotated[float, msgspec.Meta(ge=0, le=1e11)]
