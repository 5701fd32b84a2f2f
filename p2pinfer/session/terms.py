"""Terms of a session, which every hop of it is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.numerics import Codec, row_bytes


@dataclass(frozen=True, slots=True)
class SessionTerms:
    """Terms that every hop of one session is asked for.

    Attributes:
        session: The session's random 16-byte name.
        codec: The dtype in which hidden states travel.
        max_tokens: Positions that every hop reserves.
    """

    session: bytes
    spec: ModelSpec
    codec: Codec
    max_tokens: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one position's hidden state on the wire."""
        return row_bytes(self.spec.hidden_size, self.codec)
