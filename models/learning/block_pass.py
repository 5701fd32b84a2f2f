"""One block as a differentiable function of its input and its adapter; the weights are constants.

The formulas are those of `compute/blocks.py`, without its writes in place and without a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from p2pinfer.models.compute.architecture import Architecture
from p2pinfer.models.compute.blocks import BlockLayers
from p2pinfer.models.compute.mlp import ExpertMlp, FeedForward
from p2pinfer.models.compute.rope import Rotation, swap_pairs

from .adapter import BlockAdapter
from .products import Dropout, Inputs, product, updated
from .rows import Rows


def run_block(
    layers: BlockLayers,
    architecture: Architecture,
    window: int | None,
    hidden: Tensor,
    rotation: Rotation | None,
    rows: Rows,
    adapter: BlockAdapter,
    dropout: Dropout,
    *,
    stepwise: bool = False,
) -> Tensor:
    """Hidden states after one block.

    Args:
        hidden: (tokens, hidden_size), the sequences of `rows`; left as it is.
        rotation: That of the block; None where it rotates nothing.
        stepwise: Attention rounds after every operation; the norms of `layers` say for themselves.
    """
    if adapter.prompt is not None:
        at, which = rows.first_tokens(len(adapter.prompt))
        hidden = hidden.index_add(0, at, adapter.prompt[which].to(hidden.dtype))
    scale = architecture.residual_scale
    normed = hidden if layers.attention_norm is None else layers.attention_norm(hidden)
    attend = partial(rows.attend, architecture, window, prefix=adapter.prefix(), stepwise=stepwise)
    output = _attention(layers, architecture, attend, normed, rotation, adapter, dropout)
    if layers.attention_output_norm is not None:
        output = layers.attention_output_norm(output)
    attended = hidden + output * scale
    if not architecture.family.parallel:
        hidden = normed = attended
    if layers.mlp_norm is not None:
        normed = layers.mlp_norm(hidden)
    if isinstance(layers.mlp, ExpertMlp):
        output = _experts(layers.mlp, normed)
    else:
        output = _dense(layers.mlp, normed, architecture, adapter, dropout)
    if layers.mlp_output_norm is not None:
        output = layers.mlp_output_norm(output)
    return attended + output * scale


def _attention(
    layers: BlockLayers,
    architecture: Architecture,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    normed: Tensor,
    rotation: Rotation | None,
    adapter: BlockAdapter,
    dropout: Dropout,
) -> Tensor:
    heads, kv_heads, size = architecture.heads, architecture.kv_heads, architecture.head_dim
    parts = torch.split(product(layers.qkv, normed), [heads * size, kv_heads * size, kv_heads * size], -1)
    # Of a family that stores them as one, or by other names, no adapter has these.
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    inputs = Inputs(normed)
    queries, keys, values = (
        updated(part, inputs, adapter.on(name), dropout).view(len(normed), -1, size)
        for name, part in zip(names, parts, strict=True)
    )
    if layers.query_norm is not None and layers.key_norm is not None:
        queries, keys = layers.query_norm(queries), layers.key_norm(keys)
    if rotation is not None:
        queries, keys = _rotated(queries, rotation), _rotated(keys, rotation)
    attended = attend(queries, keys, values, layers.sinks)
    output = product(layers.output, attended)
    return updated(output, Inputs(attended), adapter.on(architecture.family.output), dropout)


def _dense(
    mlp: FeedForward, normed: Tensor, architecture: Architecture, adapter: BlockAdapter, dropout: Dropout
) -> Tensor:
    family = architecture.family
    both = product(mlp.gate_up, normed)
    parts = torch.split(both, both.shape[-1] // len(family.gate_up), -1)
    inputs = Inputs(normed)
    outputs = [
        updated(part, inputs, adapter.on(name), dropout)
        for name, part in zip(family.gate_up, parts, strict=True)
    ]
    inner = mlp.inner(outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1))
    return updated(product(mlp.down, inner), Inputs(inner), adapter.on(family.down), dropout)


def _experts(mlp: ExpertMlp, normed: Tensor) -> Tensor:
    chosen, weights = mlp.weigh(product(mlp.router, normed).float(), normed.dtype)
    output = torch.zeros_like(normed)
    for index in sorted({int(expert) for expert in chosen.flatten()}):
        token, rank = torch.where(chosen == index)
        inner = _plain(mlp.experts[index], normed[token])
        output = output.index_add(0, token, inner * weights[token, rank, None])
    if mlp.shared is not None and mlp.shared_gate is not None:
        output = output + product(mlp.shared_gate, normed).sigmoid() * _plain(mlp.shared, normed)
    return output


def _plain(layer: FeedForward, rows: Tensor) -> Tensor:
    return product(layer.down, layer.inner(product(layer.gate_up, rows)))


def _rotated(heads: Tensor, rotation: Rotation) -> Tensor:
    """`heads`, (tokens, any number of heads, head_dim), turned."""
    width = rotation.cos.shape[-1]
    turned = heads[..., :width]
    turned = turned * rotation.cos + swap_pairs(turned, rotation) * rotation.sin
    return turned if width == heads.shape[-1] else torch.cat((turned, heads[..., width:]), -1)
