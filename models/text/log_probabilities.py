"""Log probabilities of a generated token and of the likeliest ones in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogProbabilities:
    """The model's view of one place in a text, before rules, temperature and filters.

    Attributes:
        token: Log probability of the token that was taken, at most 0.
        likeliest: Token ids and their log probabilities, the likeliest first.
    """

    token: float
    likeliest: tuple[tuple[int, float], ...]


def log_probabilities(logits: Tensor, token_id: int, count: int) -> LogProbabilities:
    """Those of `token_id` and of the `count` likeliest tokens.

    Args:
        logits: (vocab,), as they come from the head.
        count: May be 0; of a vocabulary that is smaller, all of it.
    """
    logs = logits.float().log_softmax(0)
    best = logs.topk(min(count, len(logs)))
    likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return LogProbabilities(float(logs[token_id]), tuple(likeliest))
