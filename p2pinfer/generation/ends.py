"""Ends of a model as a generation sees them: what goes in for token ids, and a token for what comes out.

Two kinds: embedding and head that run here (`local_ends`), or at the first and the last hop (`drawn_ends`).
Whichever it is, the token at a position is the same function of the text, the settings and the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from p2pinfer.models.text.log_probabilities import LogProbabilities
from p2pinfer.session.terms import Inputs


class Ends(Protocol):
    """Both ends, for one text."""

    def embed(self, token_ids: Sequence[int]) -> Inputs:
        """Inputs of the first hop for some tokens."""
        ...

    def split(self, outputs: Any) -> Sequence[Any]:
        """Outputs of a trip, position by position."""
        ...

    def draw(self, output: Any, ids: Sequence[int]) -> tuple[int, LogProbabilities | None]:
        """The token behind `ids`, by the output at the last of them; and log probabilities if wanted."""
        ...
