"""Watch over a training: it is shown every pass, and says whose are not wanted any more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from p2pinfer.node.evidence.pass_record import PassRecord


class PassWatch(Protocol):
    """Auditor of passes. All of it returns at once."""

    def passed(self, record: PassRecord, figures: Mapping[str, float]) -> None:
        """Take note of a pass whose receipt is in order.

        Args:
            figures: See `models.verify.pass_figures`.
        """
        ...

    def is_banned(self, peer_id: str) -> bool:
        """True if passes of this peer are not wanted any more."""
        ...
