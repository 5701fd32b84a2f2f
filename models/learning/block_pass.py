"""One block as a differentiable function of its input and its adapter; the weights are constants.

The formulas are those of `compute/blocks.py`, without its writes in place and without a cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from p2pinfer.models.compute.blocks import BlockLayers
from p2pinfer.models.compute.families import Architecture
from p2pinfer.models.compute.mlp import ExpertMlp, GatedMlp
from p2pinfer.models.compute.rope import Rotation

from .adapter import BlockAdapter
from .products import Dropout, product, updated
from .rows import Rows


def run_block(
    layers: BlockLayers,
    architecture: Architecture,
    window: int | None,
    hidden: Tensor,
    rotation: Rotation,
    rows: Rows,
    adapter: BlockAdapter,
    dropout: Dropout,
) -> Tensor:
    """Hidden states after one block.

    Args:
        hidden: (tokens, hidden_size), the sequences of `rows`; left as it is.
    """
    if adapter.prompt is not None:
        at, which = rows.first_tokens(len(adapter.prompt))
        hidden = hidden.index_add(0, at, adapter.prompt[which].to(hidden.dtype))
    output = _attention(
        layers, architecture, window, layers.attention_norm(hidden), rotation, rows, adapter, dropout
    )
    if layers.attention_output_norm is not None:
        output = layers.attention_output_norm(output)
    hidden = hidden + output
    normed = layers.mlp_norm(hidden)
    if isinstance(layers.mlp, ExpertMlp):
        output = _experts(layers.mlp, normed)
    else:
        output = _gated(layers.mlp, normed, adapter, dropout)
    if layers.mlp_output_norm is not None:
        output = layers.mlp_output_norm(output)
    return hidden + output


def _attention(
    layers: BlockLayers,
    architecture: Architecture,
    window: int | None,
    normed: Tensor,
    rotation: Rotation,
    rows: Rows,
    adapter: BlockAdapter,
    dropout: Dropout,
) -> Tensor:
    heads, kv_heads, size = architecture.heads, architecture.kv_heads, architecture.head_dim
    parts = torch.split(product(layers.qkv, normed), [heads * size, kv_heads * size, kv_heads * size], -1)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    queries, keys, values = (
        updated(part, normed, adapter.on(name), dropout).view(len(normed), -1, size)
        for name, part in zip(names, parts, strict=True)
    )
    if layers.query_norm is not None and layers.key_norm is not None:
        queries, keys = layers.query_norm(queries), layers.key_norm(keys)
    queries, keys = _rotated(queries, rotation), _rotated(keys, rotation)
    attended = rows.attend(architecture, window, queries, keys, values)
    return updated(product(layers.output, attended), attended, adapter.on("self_attn.o_proj"), dropout)


def _gated(mlp: GatedMlp, normed: Tensor, adapter: BlockAdapter, dropout: Dropout) -> Tensor:
    gate, up = product(mlp.gate_up, normed).chunk(2, -1)
    gate = updated(gate, normed, adapter.on("mlp.gate_proj"), dropout)
    up = updated(up, normed, adapter.on("mlp.up_proj"), dropout)
    inner = mlp.activation(gate) * up
    return updated(product(mlp.down, inner), inner, adapter.on("mlp.down_proj"), dropout)


def _experts(mlp: ExpertMlp, normed: Tensor) -> Tensor:
    scores = product(mlp.router, normed).float()
    odds = scores.softmax(-1)
    chosen = scores.topk(mlp.experts_per_token, dim=-1).indices
    weights = odds.gather(-1, chosen)
    weights = (weights / weights.sum(-1, keepdim=True)).to(normed.dtype)
    output = torch.zeros_like(normed)
    for index in sorted({int(expert) for expert in chosen.flatten()}):
        token, rank = torch.where(chosen == index)
        expert = mlp.experts[index]
        gate, up = product(expert.gate_up, normed[token]).chunk(2, -1)
        inner = product(expert.down, expert.activation(gate) * up)
        output = output.index_add(0, token, inner * weights[token, rank, None])
    return output


def _rotated(heads: Tensor, rotation: Rotation) -> Tensor:
    """`heads`, (tokens, any number of heads, head_dim), turned."""
    return heads * rotation.cos + heads.roll(heads.shape[-1] // 2, -1) * rotation.sin
