"""Embedding and head as training needs them: hidden states of tokens, and the gradient of a loss.

Both stay as they are. The head is only applied where a token is to be predicted, some rows at a time: the
logits of 1,024 rows of a vocabulary of 150,000 would take 600 MB, and their gradient as much again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead

from .products import product

IGNORED: Final = -100  # label of what is not predicted, as in transformers
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # logits (n, vocab) float32, labels (n,) -> their sum
_ROWS: Final = 512  # at once


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods of `labels`, (n,), by `logits`, (n, vocab_size)."""
    return functional.cross_entropy(logits, labels, reduction="sum")


class TrainedEnds:
    """The two ends of a model, whose parameters are constants."""

    def __init__(self, ends: EmbeddingAndHead) -> None:
        self._ends = ends

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """The hidden states that enter block 0, (tokens, hidden_size), on the CPU."""
        return self._ends.embed(token_ids).clone()

    def last_logits(self, hidden: Tensor) -> Tensor:
        """Logits, (vocab_size,) float32, of the last of the rows that left the last block."""
        return self._ends.logits(hidden[-1:])[0].clone()

    def loss(self, hidden: Tensor, labels: Tensor, loss: Loss) -> tuple[float, Tensor]:
        """A loss summed over what is predicted, and its gradient.

        Args:
            hidden: (tokens, hidden_size), what left the last block.
            labels: (tokens,) int64: the token that follows each one, or `IGNORED`.

        Returns:
            The sum, and the gradient of `hidden` in its shape, float32 on the CPU.
        """
        total = 0.0
        gradient = torch.zeros(hidden.shape)
        places = torch.where(labels != IGNORED)[0]
        for start in range(0, len(places), _ROWS):
            where = places[start : start + _ROWS]
            with torch.enable_grad():
                rows = hidden[where].detach().to(self._ends.device, self._ends.dtype).requires_grad_()
                value = loss(self._logits(rows), labels[where].to(rows.device))
                (found,) = torch.autograd.grad(value, [rows])
            total += float(value.detach())
            gradient[where] = found.float().cpu()
        return total, gradient

    def _logits(self, rows: Tensor) -> Tensor:
        return self._ends.scaled(product(self._ends.head, self._ends.norm(rows)).float())
