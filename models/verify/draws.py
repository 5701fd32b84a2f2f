"""Check of both ends of a model at hops: rows against token ids, and tokens against hidden states.

What a hop embedded is a look into a table, so only rounding may differ. What it drew is a function of hidden
states that it has signed for, of settings and of a seed: the race of `sampling` is run again, and the token
that it says has won has to be within rounding of the winner. Filters such as top_p are run twice, a little
wider and a little narrower, since a token at their edge may be in or out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.text.sampling import candidates, uniform_noise
from p2pinfer.models.text.sampling_config import SamplingConfig

_ROWS: Final = 32  # whose logits are held at once
_TOP: Final = 64  # tokens by whose logits rounding is measured
_WIDE: Final = 8.0  # units of rounding by which filters are widened and narrowed
_STEP: Final = 2.0**-8  # of bfloat16, relative


@dataclass(frozen=True, slots=True)
class DrawDeviation:
    """The worst of some draws.

    Attributes:
        tokens: How many were looked at.
        worst: How far behind the winner's the drawn token's score is, in units of what rounding to bfloat16
            does to logits; infinite for a token that could not be drawn at all.
        position: Of the token that is worst.
    """

    tokens: int
    worst: float = 0.0
    position: int = 0


def measure_embedded(ends: EmbeddingAndHead, token_ids: Sequence[int], rows: Tensor) -> float:
    """Largest difference of `rows` from what the ids are embedded to, in roundings of bfloat16.

    Args:
        rows: (tokens, hidden_size) float32.
    """
    due = ends.embed(token_ids).float()
    room = due.abs().maximum(due.abs().mean(-1, keepdim=True)) * _STEP
    return float(((rows - due).abs() / room.clamp_min(torch.finfo(torch.float32).tiny)).max())


def measure_draws(
    ends: EmbeddingAndHead,
    hidden: Tensor,
    positions: Sequence[int],
    drawn: Sequence[int],
    process: Callable[[Tensor, int], Tensor],
    config: SamplingConfig,
) -> DrawDeviation:
    """Deviation of the tokens that were drawn behind some positions.

    Args:
        ends: In float32.
        hidden: (n, hidden_size), what left the last block at these positions.
        drawn: A token each.
        process: Applies the text's rules to logits (vocab,), given the number of tokens before the draw.
        config: With its seed.
    """
    found = DrawDeviation(len(drawn))
    if config.typical_p < 1 or config.top_h:
        return replace(found, tokens=0)  # who stays turns on every logit: no edge can be told from rounding
    for start in range(0, len(drawn), _ROWS):
        rows = hidden[start : start + _ROWS]
        for index, (right, unit) in enumerate(_logits(ends, rows), start):
            length = positions[index] + 1
            worst = _lead_lost(process(right, length), unit, drawn[index], length, config) / unit
            if worst > found.worst:
                found = DrawDeviation(len(drawn), worst, length)
    return found


def measure_logs(
    ends: EmbeddingAndHead,
    hidden: Tensor,
    said: Sequence[Sequence[tuple[int, float]]],
    count: int,
) -> float:
    """Largest error of log probabilities that a hop gave with its draws, in units as those of the draws.

    Args:
        ends: In float32.
        hidden: (n, hidden_size), what left the last block.
        said: For each, tokens and their log probabilities: the one that was drawn, then the likeliest ones.
        count: Of how many of the likeliest each should tell.

    Returns:
        `math.inf` where one tells of more or fewer.
    """
    worst = 0.0
    for start in range(0, len(said), _ROWS):
        for index, (right, unit) in enumerate(_logits(ends, hidden[start : start + _ROWS]), start):
            logs = right.log_softmax(-1)
            edge = [float(each) for each in logs.topk(min(count, len(logs))).values]
            drawn, *likeliest = said[index]
            if len({token for token, _ in likeliest}) != len(edge):
                return math.inf
            errors = [abs(float(logs[token]) - log) for token, log in (drawn, *likeliest)]
            behind = [edge[-1] - float(logs[token]) for token, _ in likeliest]
            worst = max(worst, *(each / unit for each in (*errors, *behind)))
    return worst


def _logits(ends: EmbeddingAndHead, rows: Tensor) -> list[tuple[Tensor, float]]:
    """Logits of each row, and what rounding does to the likeliest ones, root mean square."""
    with torch.inference_mode():
        normed = ends.norm(rows.to(ends.device, ends.dtype))
        right = ends.scaled(ends.head(normed).float()).cpu()
        near = ends.scaled(ends.head(normed.bfloat16().to(ends.dtype)).bfloat16().float()).cpu()
    top = right.topk(min(_TOP, right.shape[-1])).indices
    changes = (near.gather(-1, top) - right.gather(-1, top)).square().mean(-1).sqrt()
    # Weights are rounded as well, by as much as what they are multiplied with.
    least = right.abs().amax(-1) * _STEP / 8
    units = (changes * math.sqrt(2)).maximum(least).clamp_min(1e-6)
    return list(zip(right, units.tolist(), strict=True))


def _lead_lost(logits: Tensor, unit: float, token_id: int, length: int, config: SamplingConfig) -> float:
    """Difference of logits by which a token is behind the winner; infinite if it takes no part."""
    if not logits[token_id] > -torch.inf:
        return math.inf
    if config.temperature == 0:
        return float(logits.max() - logits[token_id])
    room = 2 * _WIDE * unit / config.temperature
    inside, _ = candidates(logits, _shifted(logits, config, room))
    if token_id not in set(inside.tolist()):
        return math.inf
    sure, _ = candidates(logits, _shifted(logits, config, -room))
    assert config.seed is not None
    runners = torch.cat([sure, torch.tensor([token_id])])
    noise = uniform_noise(config.seed, length, runners).log_().neg_().log_().neg_()
    scores = logits[runners].double() / config.temperature + noise
    return float((scores.max() - scores[-1]) * config.temperature)


def _shifted(logits: Tensor, config: SamplingConfig, room: float) -> SamplingConfig:
    """Filters that are wider where `room`, a difference of heated logits, is positive, and else narrower."""
    factor = math.exp(-room)
    top_k = config.top_k
    if top_k:
        scores = logits / config.temperature
        edge = scores.topk(min(top_k, len(scores))).values[-1]
        top_k = max(1, int((scores >= edge - room).sum()))
    return replace(
        config,
        top_p=max(1e-9, 1 - (1 - config.top_p) * factor),
        top_k=top_k,
        min_p=min(1.0, config.min_p * factor),
        epsilon_cutoff=min(0.999, config.epsilon_cutoff * factor),
        eta_cutoff=min(0.999, config.eta_cutoff * factor),
    )
