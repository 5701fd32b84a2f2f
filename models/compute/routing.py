"""Choice of experts from outside: what a mixture's blocks ask when their own choice is not to be taken."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ExpertChoice(Protocol):
    """Decision on the experts of each token, block by block."""

    def choose(self, block: int, scores: Tensor, count: int) -> Tensor:
        """Experts of a batch's tokens in a block.

        Args:
            block: Index within the model.
            scores: (tokens, experts) float32, what the router gives, before the softmax.
            count: How many experts a token goes to.

        Returns:
            (tokens, count) int64, in any order.
        """
        ...
