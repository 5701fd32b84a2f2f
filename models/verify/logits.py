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
_LEAST_LEAD = 4.0  # units of its logits that the lost lead of one token takes to speak against a peer
_COUNTED_LEAD = 1.0  # and to be counted among its small lies


@dataclass(frozen=True, slots=True)
class LogitEffect:
    """Effects on the logits by token, each (n,).

    Attributes:
        rho: The largest change among the likeliest tokens' logits, over what rounding changes there.
        lead: The lead that was lost, a difference of probabilities; 0 where none was.
        gap: The same as a difference of logits, in units of what rounding changes there. Where logits are
            far apart, rounding alone takes leads of 0.9; so a lead counts only if it is large in both.
        doubtful: Tokens that may have gone to other experts unnoticed, of which no single one is judged.
    """

    rho: Tensor
    lead: Tensor
    gap: Tensor
    doubtful: Tensor

    def part(self, part: slice) -> LogitDeviation:
        """Effect on some adjacent tokens."""
        rho, sure = self.rho[part], ~self.doubtful[part]
        lead, gap = self.lead[part] * sure, self.gap[part]
        return LogitDeviation(
            float(rho.median()),
            float((rho * sure).max()),
            float((lead * (gap > _LEAST_LEAD)).max()),
            int(((lead > LOST_LEAD) & (gap > _COUNTED_LEAD)).sum()),
        )


def measure_effect(
    embedding_and_head: EmbeddingAndHead,
    runs: Sequence[Tensor],
    drawn: Sequence[Tensor] = (),
    doubtful: Tensor | None = None,
) -> LogitEffect:
    """Effect of the last of `runs` on the logits, in units of what rounding changes there.

    Args:
        runs: Hidden states after the last block, each (n, hidden_size): the exact ones, the rounded ones, and
            those that are looked at.
        drawn: The same under other choices of experts for tokens that are not seen (`NoiseFloor.drawn`). What
            these change is noise as well.
        doubtful: (n,) bool, see `LogitEffect`; none if None.
    """
    changes, floors, sways, leads, gaps = map(
        torch.cat, zip(*_compare(embedding_and_head, runs, drawn), strict=True)
    )
    least = max(_LEAST_LOGIT_FLOOR * float(floors.median()), torch.finfo(torch.float32).tiny)
    unit = (floors.clamp_min(least).square() + sways.square()).sqrt()
    none = torch.zeros(len(unit), dtype=torch.bool)
    return LogitEffect(changes / unit, leads, gaps / unit, none if doubtful is None else doubtful)


def lost_lead(ends: EmbeddingAndHead, right: Tensor, got: Tensor) -> float:
    """Largest lead, a difference of probabilities, that any row's likeliest successor lost; 0 if none did.

    Args:
        right: (n, hidden_size) float32, after the last block.
        got: The same, of whoever is looked at.
    """
    due, given = torch.split(ends.logits(torch.cat([right, got])), len(right))
    first, second = due.softmax(-1).topk(2).values.unbind(-1)
    return float(((first - second) * (given.argmax(-1) != due.argmax(-1))).max())


def _compare(
    embedding_and_head: EmbeddingAndHead, runs: Sequence[Tensor], drawn: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Piece by piece: changes of the likeliest tokens' logits, by rounding, by draws; leads lost, gaps."""
    for start in range(0, len(runs[0]), _LOGIT_TOKENS):
        rows = [run[start : start + _LOGIT_TOKENS] for run in (*runs, *drawn)]
        logits = torch.split(embedding_and_head.logits(torch.cat(rows)), len(rows[0]))
        (right, *near, got), others = logits[: len(runs)], logits[len(runs) :]
        count = min(_TOP_TOKENS, right.shape[-1])
        # Whatever either side thinks likely: a token may be pushed up from anywhere.
        top = torch.cat([right.topk(count).indices, got.topk(count).indices], -1)
        reference = right.gather(-1, top)
        change, *rounding = ((each.gather(-1, top) - reference).abs().amax(-1) for each in (got, *near))
        usual = torch.stack(rounding).square().mean(0).sqrt()
        sway = torch.zeros_like(usual)
        for each in others:
            sway = sway.maximum((each.gather(-1, top) - reference).abs().amax(-1))
        flipped = got.argmax(-1) != right.argmax(-1)
        first, second = right.softmax(-1).topk(2).values.unbind(-1)
        best, next_best = right.topk(2).values.unbind(-1)
        yield change, usual, sway, (first - second) * flipped, (best - next_best) * flipped
