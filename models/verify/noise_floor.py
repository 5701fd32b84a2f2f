"""Rounding noise of bfloat16 in a span, measured on the session that is to be judged.

Honest peers differ: other kernels, other batches, other processors. How much is fair depends on the span,
its depth and the token, by factors of a hundred on trained weights, so no fixed tolerance is of use. The
verifier therefore runs the span in float32 (`exact`), and in bfloat16 in two ways that honest software
rounds (`rounded`: fused kernels, and one operation after the other), and takes the distance as the unit:

    floor(t) = root mean square, over both rounded runs, of || (rounded - exact)(t) / s ||
    rho(t) = || (output - exact)(t) / s || / max(floor(t), half its median)

One run alone is a single throw of the dice: the first token's rounding, which all others see, may make it a
quarter too large for a whole chunk, and transformers' eager attention then lies up to 1.39 floors away.
(Comparing an error with that of a re-execution is also behind Activation-DiFR, arXiv 2511.20621.)

Division by `s`, channel by channel, keeps the few channels that always carry huge values from being all
that is seen. `s` is the root mean square of what the span adds to its input, over this session's tokens but
the first, drawn towards its median over the channels where tokens are few. Half the median as the least
divisor keeps a token that happened to round well from looking tampered with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_OF_MEDIAN = 0.5
_PRIOR_TOKENS = 4.0  # the weight of the median over channels in `s`, in tokens


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """Effect of rounding on each token of a session.

    Attributes:
        exact: (tokens, hidden_size) float32, the span in float32.
        rounded: The same of each run in bfloat16, as it comes out of the wire.
        scale: (hidden_size,) float32, what each channel is divided by; above 0.
        distance: (tokens,) float32, the usual one from `exact` to `rounded` in that scale.
        least: The least divisor.
    """

    exact: Tensor
    rounded: Sequence[Tensor]
    scale: Tensor
    distance: Tensor
    least: float

    def deviations(self, outputs: Tensor, positions: Tensor) -> Tensor:
        """(n, hidden_size): outputs less `exact`, in units of the floor; a row's norm is its rho.

        Args:
            outputs: (n, hidden_size) float32, finite.
            positions: (n,), each the index of a token of the session.
        """
        floor = self.distance[positions].clamp_min(self.least)
        return (outputs - self.exact[positions]) / self.scale / floor[:, None]

    def alike(self, positions: Tensor) -> float:
        """Part of their squared rounding that these tokens have in common, on average over the runs."""
        shared = [shared_part(self.deviations(run[positions], positions)) for run in self.rounded]
        return sum(shared) / len(shared)


def measure_floor(inputs: Tensor, exact: Tensor, rounded: Sequence[Tensor]) -> NoiseFloor:
    """The floor of a session, all of whose tensors are (tokens, hidden_size) float32."""
    scale = channel_scale(inputs, exact)
    distances = torch.stack([((each - exact) / scale).norm(dim=-1) for each in rounded])
    distance = distances.square().mean(0).sqrt()
    typical = distance[1:] if len(distance) > 1 else distance
    least = max(_LEAST_OF_MEDIAN * float(typical.median()), torch.finfo(torch.float32).tiny)
    return NoiseFloor(exact, rounded, scale, distance, least)


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
