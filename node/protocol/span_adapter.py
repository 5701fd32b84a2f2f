"""Part of an adapter for the blocks of one hop, as it travels: layout, values, and the digest of both.

Whoever holds the same adapter makes the same part of it, so its digest is a name that both sides know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pinfer.models.learning.adapter import AdapterLayout, LowRank
from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.receipt import digest_of

from .train_messages import Update
from .train_tensors import adapter_content, encode_vector, updates_of


@dataclass(frozen=True, slots=True)
class SpanAdapter:
    """Part of an adapter for one hop.

    Attributes:
        updates: Its layout.
        payload: Its values, float32.
        values: Digest of the payload.
        digest: Of layout and values, by which passes name it.
    """

    updates: tuple[Update, ...]
    prompt_tokens: int
    payload: bytes
    values: bytes
    digest: bytes


def part_of(
    span: BlockSpan, updates: Sequence[LowRank], factors: Sequence[Tensor], prompts: Tensor | None = None
) -> SpanAdapter | None:
    """Part of an adapter in the blocks of `span`; None if it changes none of them.

    Args:
        factors: A and B of each update, in turn, float32.
        prompts: (num_blocks of the model, prompt_tokens, hidden_size), or None.

    Raises:
        ValueError: A value is not finite.
    """
    chosen = [index for index, each in enumerate(updates) if span.start <= each.block < span.stop]
    if not chosen and prompts is None:
        return None
    prompt_tokens = 0 if prompts is None else prompts.shape[1]
    layout = AdapterLayout(tuple(updates[index] for index in chosen), prompt_tokens)
    parts = [factors[2 * index + which].flatten() for index in chosen for which in (0, 1)]
    if prompts is not None:
        parts.append(prompts[span.start : span.stop].flatten())
    values = torch.cat(parts)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("a value that is not finite")
    payload, travelling = encode_vector(values), updates_of(layout)
    of_values = digest_of(payload)
    digest = digest_of(adapter_content(travelling, prompt_tokens, of_values))
    return SpanAdapter(travelling, prompt_tokens, payload, of_values, digest)
