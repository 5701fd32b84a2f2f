"""Deviation of a peer's output from the published model's; `reputation.verdict` judges it.

The unit is the rounding of bfloat16: a ratio of 1 is what computing in bfloat16 costs by itself. See
`noise_floor` for how it is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

HIGH_RHO: Final = 1.5  # the ratio above which a token is counted as high
LOST_LEAD: Final = 0.02  # the lead above which a token that lost it is counted


@dataclass(frozen=True, slots=True)
class LogitDeviation:
    """Effect of a chunk's deviation on the logits.

    Attributes:
        median_rho: The median over the tokens of the largest change among the likeliest tokens' logits, over
            what rounding changes there.
        max_rho: The same, of the worst token.
        flip_margin: Of the tokens whose likeliest successor is another one, the largest lead (a difference
            of probabilities) that the published model gives to its own; 0 if there is none.
        lost_leads: How many of them lost a lead of more than `LOST_LEAD`.
    """

    median_rho: float
    max_rho: float
    flip_margin: float
    lost_leads: int = 0


@dataclass(frozen=True, slots=True)
class ChunkDeviation:
    """The deviation of some adjacent tokens.

    Attributes:
        start: The position of the first of them.
        stop: One more than the last one's.
        tokens: How many of them there were to look at.
        median_rho: The median of the tokens' ratios.
        upper_rho: Nine of ten tokens have at most this ratio.
        max_rho: The worst token's.
        shared: How much of the squared deviations the tokens have in common, see `noise_floor.shared_part`.
        logits: What it does to the logits; None where the blocks after the span were not to be had.
        alike: As `shared`, of the rounding itself, on average over the rounded runs: near 1 where a text
            repeats itself, since equal tokens round alike.
        high: How many of the tokens have a ratio above `HIGH_RHO`.
        undecided: Tokens that are left out of all figures, for there were more admissible choices of experts
            than could be tried, or their inputs are too faint for dtypes to round alike.
        clouded: Whether such a token precedes the last of these, so that what it left in the caches may be
            why a token deviates.
        swayed: As `shared`, of what other choices of experts for tokens that are not seen do to these.
        rerouted: Tokens that took other experts than the reference, all of them admissible.
    """

    start: int
    stop: int
    tokens: int
    median_rho: float
    upper_rho: float
    max_rho: float
    shared: float
    logits: LogitDeviation | None = None
    alike: float = 0.0
    high: int = 0
    undecided: int = 0
    clouded: bool = False
    swayed: float = 0.0
    rerouted: int = 0


@dataclass(frozen=True, slots=True)
class Deviation:
    """The deviation of a session's outputs from a span.

    Attributes:
        chunks: In order, the first position of the sequence left out.
        first_rho: The ratio at that position, if it was among the outputs. It is kept apart: some models
            give it activations a hundred times larger than all others, and rounding there follows no rule.
    """

    chunks: tuple[ChunkDeviation, ...]
    first_rho: float | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens in the chunks."""
        return sum(chunk.tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Glance:
    """Distance of outputs from a span in float32, in units of the rounding of what is carried.

    See `glance.glance_at`.

    Attributes:
        tokens: Number of tokens that were looked at; the sequence's first one is not.
        typical: Median token's distance, in the chunk where it is largest.
        worst: Largest distance of any token.
        lost: Largest lead that the likeliest successor of a token lost, of those followed to their logits.
    """

    tokens: int
    typical: float
    worst: float
    lost: float = 0.0


@dataclass(frozen=True, slots=True)
class TensorDeviation:
    """Deviation of the gradient of one tensor of an adapter.

    Attributes:
        name: Block and tensor, for people.
        rho: Length of the difference, in units of what rounding makes of it.
    """

    name: str
    rho: float


@dataclass(frozen=True, slots=True)
class PassDeviation:
    """Deviation of a pass of training from a span.

    Attributes:
        hidden: That of the outputs, or of the gradient of the inputs; None where none were due.
        tensors: Those of the adapter's gradient.
        alike: Part of their squared rounding that the tokens have in common.
        tokens: Number of tokens that are not the first of their sequence, nor in doubt.
        roughness: Part of what the blocks do that rounding decides.
        doubtful: Number of tokens whose router hangs between two experts, or whose inputs are too faint.
        is_backward: The pass is a backward one.
    """

    hidden: Deviation | None
    tensors: tuple[TensorDeviation, ...]
    alike: float
    tokens: int
    roughness: float
    doubtful: int
    is_backward: bool
