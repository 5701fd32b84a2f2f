"""Which token comes next: the greedy one, or a draw that can be repeated.

A draw is a function of (seed, position) and the logits alone. No generator is carried from token to token,
so a generation that is resumed elsewhere, or rolled back, draws what it would have drawn.
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

from p2pinfer.errors import ConfigError

_FEW = 1024  # nearly always hold top_p, and finding them takes a tenth of sorting a vocabulary


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How tokens are chosen; the defaults are greedy."""

    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # keep the likeliest tokens that make up this share; 1 keeps all
    top_k: int = 0  # keep this many; 0 keeps all
    seed: int | None = None  # None draws a fresh one

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (all) or more")


class Sampler:
    """Picks tokens by one config.

    Attributes:
        seed: What its draws depend on, also where the config gave none.
    """

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self.seed = secrets.randbits(63) if config.seed is None else config.seed

    def pick(self, logits: Tensor, position: int) -> int:
        """The token at `position` of the sequence.

        Args:
            logits: (vocab,) float32, finite.
            position: Where the token will stand, the prompt counted.
        """
        if self.config.temperature == 0:
            return int(logits.argmax())
        token_ids, probabilities = candidates(logits, self.config)
        cumulative = probabilities.double().cumsum(0)
        # Scaled by the sum as it is computed, so that rounding leaves no gap at the end.
        at = int(torch.searchsorted(cumulative, cumulative[-1] * _uniform(self.seed, position), right=True))
        return int(token_ids[min(at, len(token_ids) - 1)])


def candidates(logits: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their probabilities, as transformers' warpers leave them.

    Temperature first, then top_k, then top_p (Holtzman et al., 2020, section 3.1). Tokens that tie with the
    last of the top_k are kept.

    Returns:
        Token ids (candidates,) and probabilities (candidates,) that sum to 1.
    """
    scaled = (logits.float() - logits.max()) / config.temperature  # the least temperature must not overflow
    token_ids = torch.arange(len(scaled), device=scaled.device)
    if 0 < config.top_k < len(scaled):
        token_ids = (scaled >= scaled.topk(config.top_k).values[-1]).nonzero()[:, 0]
        scaled = scaled[token_ids]
    if config.top_p < 1:
        kept = _nucleus(scaled, config.top_p)
        token_ids, scaled = token_ids[kept], scaled[kept]
    return token_ids, scaled.softmax(0)


def _nucleus(scaled: Tensor, top_p: float) -> Tensor:
    """The indices of the fewest likeliest tokens whose probabilities reach `top_p`, likeliest first."""
    log_total = scaled.logsumexp(0)
    for count in (_FEW, len(scaled)):
        best = scaled.topk(min(count, len(scaled)))
        reached = (best.values - log_total).double().exp().cumsum(0)
        needed = int((reached < top_p).sum()) + 1
        if needed <= len(reached):
            return best.indices[:needed]
    return best.indices  # all of them: rounding kept the sum below top_p


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1), always the same for the same seed and position, on every machine."""
    digest = blake3(f"{seed}:{position}".encode()).digest(length=8)
    (bits,) = struct.unpack("<Q", digest)
    return float(bits >> 11) * 2.0**-53
