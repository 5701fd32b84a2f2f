"""Rounding noise of bfloat16 in a span, measured on the session that is to be judged.

Honest peers differ: other kernels, other batches, other processors. How much is fair depends on the span,
its depth and the token, by factors of a hundred on trained weights, so no fixed tolerance is of use. The
verifier therefore runs the span in float32 (`exact`), and in bfloat16 in two ways that honest software
rounds (`rounded`: fused kernels, and one operation after the other), and takes the distance as the unit:

    floor(t) = root mean square, over both rounded runs, of || (rounded - exact)(t) / s ||
    rho(t) = || (output - exact)(t) / s || / max(floor(t), half its median, carried(t))

One run alone is a single throw of the dice: the first token's rounding, which all others see, may make it a
quarter too large for a whole chunk, and transformers' eager attention then lies up to 1.39 floors away.
(Comparing an error with that of a re-execution is also behind Activation-DiFR, arXiv 2511.20621.)

Division by `s`, channel by channel, keeps the few channels that always carry huge values from being all
that is seen. `s` is the root mean square of what the span adds to its input, over this session's tokens but
the first, drawn towards its median over the channels where tokens are few. Half the median as the least
divisor keeps a token that happened to round well from looking tampered with. So does `carried(t)`, the
rounding of the values that are carried from block to block:

    carried(t)^2 = sum over blocks, of || u(h)(t) / s ||^2 / 12

`h` is what a block gives and `u(h)` the distance of adjacent bfloat16 numbers there; a number that is rounded
lies u/sqrt(12) away in the root mean square. It follows from the arithmetic alone, so both runs may happen to
round as `exact` does without that making the unit zero. It counts one rounding a block where there are two,
and stays below the floor of an ordinary token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .packed_outputs import unpacked_towards

FAINT = 2.0**-14  # root mean square of an input: the smallest number that float16 has to full precision
_LEAST_OF_MEDIAN = 0.5
_PRIOR_TOKENS = 4.0  # the weight of the median over channels in `s`, in tokens
_EXPONENT = 0x7F800000  # bits of a float32
_STORED_BITS = 7  # of a bfloat16's significand
_SQUARE = 2.0 ** (-2 * _STORED_BITS) / 12  # of the error, over that of the power of two


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """Effect of rounding on each token of a session.

    Attributes:
        exact: (tokens, hidden_size) float32, the span in float32.
        rounded: The same of each run in bfloat16, as it comes out of the wire.
        scale: (hidden_size,) float32, what each channel is divided by; above 0.
        distance: (tokens,) float32, the usual one from `exact` to `rounded` in that scale.
        least: The least divisor: half the median of `distance`.
        carried: (tokens,) float32, the rounding of the values that were carried: a token's least divisor.
        explain: Given outputs (n, hidden_size) and their positions, the floor along the admissible choices of
            experts that explain them best; None where nothing was chosen, or that has been done.
        drawn: Runs like `exact` under other choices for tokens whose outputs are not to be seen. What those
            do to the others is noise as well.
        rerouted: Tokens whose experts are not those that the reference takes by itself.
        undecided: Tokens with admissible choices that were not tried.
        faint: Tokens with an input that dtypes do not round alike.
        packed: (tokens,) bool, those whose outputs are packed; None if none are.
        doubtful: Tokens with a near tie. Where a swap moves a token no further than rounding does, nobody
            looks for it, and yet it may take the lead from the likeliest successor.
    """

    exact: Tensor
    rounded: Sequence[Tensor]
    scale: Tensor
    distance: Tensor
    least: float
    carried: Tensor
    explain: Callable[[Tensor, Sequence[int]], NoiseFloor] | None = None
    drawn: Sequence[Tensor] = ()
    rerouted: frozenset[int] = frozenset()
    undecided: frozenset[int] = frozenset()
    faint: frozenset[int] = frozenset()
    doubtful: frozenset[int] = frozenset()
    packed: Tensor | None = None

    def as_seen(self, outputs: Tensor, positions: Tensor) -> Tensor:
        """Outputs of some positions as near to `exact` as they may have been before they were packed."""
        if self.packed is None:
            return outputs
        return unpacked_towards(self.exact[positions], outputs, self.packed[positions])

    def explaining(self, outputs: Tensor, positions: Sequence[int]) -> NoiseFloor:
        """The floor along the choices of experts that explain these outputs best."""
        return self if self.explain is None else self.explain(outputs, positions)

    @property
    def unit(self) -> Tensor:
        """(tokens,): what a deviation is divided by."""
        unit = self.distance.maximum(self.carried).clamp_min(self.least)
        if not self.drawn:
            return unit
        swayed = torch.stack([((each - self.exact) / self.scale).norm(dim=-1) for each in self.drawn])
        return (unit.square() + swayed.amax(0).square()).sqrt()

    def deviations(self, outputs: Tensor, positions: Tensor) -> Tensor:
        """(n, hidden_size): outputs less `exact`, in units of the floor; a row's norm is its rho.

        Args:
            outputs: (n, hidden_size) float32, finite.
            positions: (n,), each the index of a token of the session.
        """
        return (outputs - self.exact[positions]) / self.scale / self.unit[positions, None]

    def alike(self, positions: Tensor) -> float:
        """Part of their squared rounding that these tokens have in common, on average over the runs."""
        shared = [shared_part(self.deviations(run[positions], positions)) for run in self.rounded]
        return sum(shared) / len(shared)

    def swayed(self, positions: Tensor) -> float:
        """The same of what choices for unseen tokens do to these, at most."""
        return max(
            (shared_part(self.deviations(run[positions], positions)) for run in self.drawn), default=0.0
        )


def measure_floor(
    inputs: Tensor, exact: Tensor, rounded: Sequence[Tensor], carried: Tensor | None = None
) -> NoiseFloor:
    """The floor of a session, all of whose tensors are (tokens, hidden_size) float32.

    Args:
        carried: The sum over blocks of `carried_square`; that of `exact` alone if None.
    """
    scale = channel_scale(inputs, exact)
    distances = torch.stack([((each - exact) / scale).norm(dim=-1) for each in rounded])
    distance = distances.square().mean(0).sqrt()
    typical = distance[1:] if len(distance) > 1 else distance
    least = max(_LEAST_OF_MEDIAN * float(typical.median()), torch.finfo(torch.float32).tiny)
    carried = carried_square(exact) if carried is None else carried
    unit = carried_unit(carried, scale)
    return NoiseFloor(exact, rounded, scale, distance, least, unit, faint=faint_tokens(inputs))


def faint_tokens(inputs: Tensor) -> frozenset[int]:
    """Tokens whose input, of (tokens, hidden_size), is so small that dtypes do not round it alike."""
    sizes = inputs.float().square().mean(-1).sqrt()
    return frozenset((sizes < FAINT).nonzero()[:, 0].tolist())


def carried_square(values: Tensor) -> Tensor:
    """Mean square of the error that rounding `values` to bfloat16 makes, value by value."""
    # A value's exponent alone is the power of two at or below it; frexp and ldexp take several times as long.
    powers = (values.float().view(torch.int32) & _EXPONENT).view(torch.float32)
    return powers.square().mul_(_SQUARE)


def carried_unit(squares: Tensor, scale: Tensor) -> Tensor:
    """(tokens,): root of a token's mean squares, (tokens, hidden_size), added up in units of `scale`."""
    return (squares / scale.square()).sum(-1).sqrt()


def channel_scale(inputs: Tensor, exact: Tensor) -> Tensor:
    """(hidden_size,): the usual size of what a span adds to each channel; above 0."""
    added = exact - inputs
    squares = (added[1:] if len(added) > 1 else added).square()
    typical = squares.mean(0).median()
    scale = ((squares.sum(0) + _PRIOR_TOKENS * typical) / (len(squares) + _PRIOR_TOKENS)).sqrt()
    return scale.clamp_min(1e-9)


def shared_part(deviations: Tensor) -> float:
    """Part of a chunk's squared deviations that its tokens have in common: the mean product of two.

    Rounding differs from token to token. Altered weights push all tokens the same way, so this tells them
    from rounding where they are no larger. It can be a little below 0, and is 0 for a single token.

    Args:
        deviations: (n, hidden_size), as of `NoiseFloor.deviations`.
    """
    count = len(deviations)
    if count < 2:
        return 0.0
    products = deviations.sum(0).square().sum() - deviations.square().sum()
    return float(products / (count * (count - 1)))
