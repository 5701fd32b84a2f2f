"""Figures of a pass that cost next to nothing, by which one that is unlike the others stands out.

Residual blocks change a hidden state, and its gradient, by a part of its length and direction. How much
differs little between microbatches of one training. So the length of what came back, over that of what went
in, and the angle between the two are watched; of an adapter's gradient, its length (after SENTINEL, arXiv
2603.03592, which watches running means of activations and gradients by stage). They judge nobody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

_LEAST = 1e-30


def pass_figures(given: Tensor, returned: Tensor | None, vector: Tensor | None) -> Mapping[str, float]:
    """Figures by name, all finite.

    Args:
        given: (tokens, hidden_size), what went in: hidden states, or the gradient of the outputs.
        returned: The same of what came back; None where nothing was due.
        vector: Gradient of the adapter; None where nothing was due.
    """
    whole = given.float()
    length = max(float(whole.norm()), _LEAST)
    figures: dict[str, float] = {}
    if returned is not None:
        back = returned.float()
        other = max(float(back.norm()), _LEAST)
        figures["length"] = math.log(other / length)
        figures["angle"] = float((whole * back).sum()) / (length * other)
    if vector is not None and len(vector):
        figures["adapter"] = math.log(max(float(vector.norm()), _LEAST) / length)
    return figures
