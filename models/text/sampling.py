"""Choice of the next token: the likeliest one, or a draw that can be repeated.

Logits, as `processors` leave them, become a distribution (`candidates`), and a token is drawn from that. A
draw is a function of (seed, position) and the distribution alone. No generator is carried from token to
token, so a generation that is resumed elsewhere, or rolled back, draws what it would have drawn. Every token
id has noise of its own, so that logits that differ by rounding draw the same token nearly always.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from blake3 import blake3
from torch import Tensor

from .sampling_config import SamplingConfig as SamplingConfig

_FEW = 1024  # nearly always hold top_p, and finding them takes a tenth of sorting a vocabulary
_FEW_OF_ENTROPY = 100  # the likeliest tokens that transformers looks at for top_h

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # SplitMix64's constants, as int64
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)

Narrowing: TypeAlias = Callable[
    [Tensor], Tensor
]  # scores (candidates,) -> the indices, or a mask, of who stay


class Sampler:
    """Picks tokens by one config.

    Attributes:
        seed: What its draws depend on, also where the config gave none.
    """

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self.seed = config.seed_or_fresh

    def pick(self, logits: Tensor, position: int) -> int:
        """The token at `position` of the sequence.

        Args:
            logits: (vocab,) float32; -inf for what must not come.
            position: Where the token will stand, the prompt counted.
        """
        if self.config.temperature == 0:
            return int(logits.argmax())
        token_ids, probabilities = candidates(logits, self.config)
        return _draw(token_ids, probabilities, self.seed, position)


def candidates(logits: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their probabilities, as transformers' warpers leave them.

    In its order, too. Tokens that tie with the last of the top_k are kept.

    Returns:
        Token ids (candidates,) and probabilities (candidates,) that sum to 1.
    """
    scores = _heated(logits.float(), config.temperature)
    token_ids = torch.arange(len(scores), device=scores.device)
    for narrow in _narrowings(config, forbids=bool(scores.min() == -torch.inf)):
        kept = narrow(scores)
        token_ids, scores = token_ids[kept], scores[kept]
    return token_ids, scores.softmax(0)


def _narrowings(config: SamplingConfig, *, forbids: bool) -> list[Narrowing]:
    """Filters of the candidates, in transformers' order; what processors forbade goes first."""
    made: list[Narrowing] = [_possible] if forbids else []
    if config.top_h:
        made.append(partial(_top_of_entropy, top_h=config.top_h))
    if config.top_k:
        made.append(partial(_top_k, top_k=config.top_k))
    if config.top_p < 1:
        made.append(partial(_nucleus, top_p=config.top_p))
    if config.min_p:
        made.append(partial(_near_the_best, min_p=config.min_p))
    if config.typical_p < 1:
        made.append(partial(_typical, mass=config.typical_p))
    if config.epsilon_cutoff:
        made.append(partial(_likely, epsilon=config.epsilon_cutoff))
    if config.eta_cutoff:
        made.append(partial(_likely_by_entropy, epsilon=config.eta_cutoff))
    return made


def _heated(logits: Tensor, temperature: float) -> Tensor:
    scores = logits / temperature
    if scores.max().isfinite():
        return scores
    return (logits - logits.max()) / temperature  # the least temperature must not overflow


def _possible(scores: Tensor) -> Tensor:
    return scores > -torch.inf


def _top_of_entropy(scores: Tensor, top_h: float) -> Tensor:
    """Top-H filter ("Top-H Decoding", arXiv 2509.02510) among the few likeliest, as transformers has it."""
    best = scores.topk(min(_FEW_OF_ENTROPY, len(scores)))
    logs = best.values.log_softmax(0)
    terms = -logs.exp() * logs
    within = terms.cumsum(0) <= terms.sum() * top_h
    within[0] = True
    return best.indices[within]


def _top_k(scores: Tensor, top_k: int) -> Tensor:
    return scores >= scores.topk(min(top_k, len(scores))).values[-1]


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest tokens that reach `top_p`, in order (Holtzman et al., 2020, section 3.1)."""
    log_total = scores.logsumexp(0)
    for count in (_FEW, len(scores)):
        best = scores.topk(min(count, len(scores)))
        reached = (best.values - log_total).double().exp().cumsum(0)
        needed = int((reached < top_p).sum()) + 1
        if needed <= len(reached):
            return best.indices[:needed]
    return best.indices  # all of them: rounding kept the sum below top_p


def _near_the_best(scores: Tensor, min_p: float) -> Tensor:
    """Nguyen et al., "Min-p sampling" (2024), section 3."""
    probabilities = scores.softmax(0)
    return probabilities >= min_p * probabilities.max()


def _typical(scores: Tensor, mass: float) -> Tensor:
    """Candidates whose surprise is nearest to the expected one, most typical first (Meister et al., 2022)."""
    logs = scores.log_softmax(0)
    entropy = -(logs * logs.exp()).sum()
    surprise = (-logs - entropy).abs()
    order = surprise.argsort()
    reached = scores[order].softmax(0).cumsum(0)
    last = min(int((reached < mass).sum()), len(order) - 1)
    return order[surprise[order] <= surprise[order[last]]]


def _likely(scores: Tensor, epsilon: float | Tensor) -> Tensor:
    """Hewitt et al., "Truncation sampling as language model desmoothing" (2022); the likeliest stays."""
    return (scores.softmax(0) >= epsilon) | (scores >= scores.max())


def _likely_by_entropy(scores: Tensor, epsilon: float) -> Tensor:
    logs = scores.log_softmax(0)
    entropy = -(logs * logs.exp()).sum()
    least = torch.tensor(epsilon)
    return _likely(scores, torch.min(least, least.sqrt() * (-entropy).exp()))


def _draw(token_ids: Tensor, probabilities: Tensor, seed: int, position: int) -> int:
    """The token that wins the race of exponential clocks: Gumbel-max (Gumbel, 1954), in one logarithm less.

    Each token's noise depends on nothing but (seed, position, token id). A small change of the logits, by
    another processor's rounding, changes the draw only where it changes who wins, while the inverse of a
    cumulative distribution moves every token behind the change. Distributions that are TV apart (total
    variation) draw different tokens with a probability of at most 2 TV / (1 + TV): Daliri et al., "Coupling
    without communication and drafter-invariant speculative decoding" (2024).
    """
    clocks = uniform_noise(seed, position, token_ids.cpu()).log_().neg_()
    return int(token_ids[int(clocks.div_(probabilities.cpu()).argmin())])


def uniform_noise(seed: int, position: int, token_ids: Tensor) -> Tensor:
    """Numbers in (0, 1) by token id, always the same for the same seed and position, on every machine.

    Number i is output i of SplitMix64, seeded with a digest of seed and position (Steele, Lea and Flood,
    "Fast splittable pseudorandom number generators", 2014).

    Args:
        token_ids: (n,) int64, on the CPU.

    Returns:
        (n,) float64.
    """
    (key,) = struct.unpack("<q", blake3(f"{seed}:{position}".encode()).digest(length=8))
    bits = (token_ids + 1).mul_(_GOLDEN_GAMMA).add_(key)  # int64 wraps round, as the algorithm's uint64 does
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        bits.bitwise_xor_(_shifted(bits, shift)).mul_(factor)
    bits.bitwise_xor_(_shifted(bits, 31))
    return _shifted(bits, 12).double().add_(0.5).mul_(2.0**-52)  # 52 bits and a half: exact, and never 0 or 1


def _shifted(bits: Tensor, by: int) -> Tensor:
    """An int64's bits shifted to the right, with zeros from the left."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)
