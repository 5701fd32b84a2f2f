"""Tokens that rounding cannot decide: what bfloat16 must agree on, whatever the processor.

How near a processor's bfloat16 comes depends on the order in which its kernels add up, so no fixed margin is
fair. transformers' own bfloat16, on the same tokens in the same run, says what rounding does here.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

_LIKELIEST = 20  # tokens that may win


class Clear(NamedTuple):
    """What float32 picks, and where no rounding may pick otherwise."""

    ids: Tensor  # (tokens,) int64
    mask: Tensor  # (tokens,) bool


def clear_choices(exact: Tensor, rounded: Tensor) -> Clear:
    """The greedy choices of float32 that lead by more than twice what rounding does to any lead.

    Args:
        exact: (tokens, vocab_size) logits in float32.
        rounded: The same tokens' in transformers' bfloat16.
    """
    likeliest = exact.topk(_LIKELIEST, -1)
    leads = likeliest.values[:, :1] - likeliest.values
    near = rounded.gather(-1, likeliest.indices)
    noise = float((near[:, :1] - near - leads).abs().max())
    return Clear(likeliest.indices[:, 0], leads[:, 1] > 2 * noise)
