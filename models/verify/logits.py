"""Effect of a span's outputs on the logits, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead

from .deviation import LOST_LEAD, LogitDeviation

_LOGIT_TOKENS = 64  # whose logits are held at once
_TOP_TOKENS = 20
_LEAST_LOGIT_FLOOR = 0.3  # of its median, as the least divisor


@dataclass(frozen=True, slots=True)
class LogitEffect:
    """Effects on the logits by token, each (n,)."""

    rho: Tensor
    flip_margin: Tensor

    def part(self, part: slice) -> LogitDeviation:
        """Effect on some adjacent tokens."""
        rho, margin = self.rho[part], self.flip_margin[part]
        lost = int((margin > LOST_LEAD).sum())
        return LogitDeviation(float(rho.median()), float(rho.max()), float(margin.max()), lost)


def measure_effect(embedding_and_head: EmbeddingAndHead, runs: Sequence[Tensor]) -> LogitEffect:
    """Effect of the last of `runs` on the logits, in units of what rounding changes there.

    Args:
        runs: Hidden states after the last block, each (n, hidden_size): the exact ones, the rounded ones, and
            those that are looked at.
    """
    changes, floors, margins = zip(*_compare(embedding_and_head, runs), strict=True)
    change, least = torch.cat(changes), torch.cat(floors)
    least = least.clamp_min(max(_LEAST_LOGIT_FLOOR * float(least.median()), torch.finfo(torch.float32).tiny))
    return LogitEffect(change / least, torch.cat(margins))


def _compare(
    embedding_and_head: EmbeddingAndHead, runs: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Piece by piece: the change of the likeliest tokens' logits, that by rounding, the margins of flips."""
    for start in range(0, len(runs[0]), _LOGIT_TOKENS):
        rows = [run[start : start + _LOGIT_TOKENS] for run in runs]
        right, *near, got = torch.split(embedding_and_head.logits(torch.cat(rows)), len(rows[0]))
        count = min(_TOP_TOKENS, right.shape[-1])
        # Whatever either side thinks likely: a token may be pushed up from anywhere.
        top = torch.cat([right.topk(count).indices, got.topk(count).indices], -1)
        reference = right.gather(-1, top)
        change, *rounding = ((each.gather(-1, top) - reference).abs().amax(-1) for each in (got, *near))
        best = right.softmax(-1).topk(2)
        flipped = got.argmax(-1) != best.indices[:, 0]
        usual = torch.stack(rounding).square().mean(0).sqrt()
        yield change, usual, (best.values[:, 0] - best.values[:, 1]) * flipped
