"""A Llama decoder in plain torch: whole rows with gradients, or one token a row with a static cache."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

INITIAL_STD = 0.02


class Block(nn.Module):
    """One decoder layer, with the names of transformers."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, wide = config["hidden_size"], config["intermediate_size"]
        self.heads, self.kv_heads, self.head_dim = (
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["head_dim"],
        )
        self.eps = config["rms_norm_eps"]

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        self.input_layernorm = nn.RMSNorm(hidden, self.eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, self.eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": linear(hidden, self.heads * self.head_dim),
                "k_proj": linear(hidden, self.kv_heads * self.head_dim),
                "v_proj": linear(hidden, self.kv_heads * self.head_dim),
                "o_proj": linear(self.heads * self.head_dim, hidden),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": linear(hidden, wide),
                "up_proj": linear(hidden, wide),
                "down_proj": linear(wide, hidden),
            }
        )

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: Tensor | None = None, at: int = 0
    ) -> Tensor:
        """(rows, tokens, hidden) to the same; `cache` is (2, rows, kv_heads, length, head_dim)."""
        rows, tokens, _ = hidden.shape
        normed, attention = self.input_layernorm(hidden), self.self_attn

        def split(name: str) -> Tensor:
            return attention[name](normed).view(rows, tokens, -1, self.head_dim).transpose(1, 2)

        query, key, value = (
            rotated(split("q_proj"), cos, sin),
            rotated(split("k_proj"), cos, sin),
            split("v_proj"),
        )
        if cache is not None:
            cache[0, :, :, at : at + tokens], cache[1, :, :, at : at + tokens] = key, value
            key, value = cache[:, :, :, : at + tokens]
        attended = functional.scaled_dot_product_attention(
            query, key, value, is_causal=cache is None, enable_gqa=True
        )
        hidden = hidden + attention["o_proj"](attended.transpose(1, 2).reshape(rows, tokens, -1))
        normed = self.post_attention_layernorm(hidden)
        return hidden + self.mlp["down_proj"](
            functional.silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed)
        )


class Llama(nn.Module):
    """A model with tied embeddings, by its config.json."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config["vocab_size"], config["hidden_size"]),
                "layers": nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"])),
                "norm": nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"]),
            }
        )
        half = torch.arange(0, config["head_dim"], 2) / config["head_dim"]
        angle = torch.outer(torch.arange(config["max_position_embeddings"]), config["rope_theta"] ** -half)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def initialise(self) -> None:
        """Small random weights, those that end a residual branch smaller, as in GPT-2."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=INITIAL_STD)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.data.div_(math.sqrt(2 * self.config["num_hidden_layers"]))

    def forward(self, ids: Tensor, caches: list[Tensor] | None = None, at: int = 0) -> Tensor:
        """Logits (rows, tokens, vocab) after `ids` (rows, tokens), which begin at position `at`."""
        hidden = self.model["embed_tokens"](ids)
        cos, sin = (part[at : at + ids.shape[1]].to(hidden.dtype) for part in (self.cos, self.sin))
        for i, block in enumerate(cast("nn.ModuleList", self.model["layers"])):
            hidden = block(hidden, cos, sin, caches[i] if caches else None, at)
        return functional.linear(self.model["norm"](hidden), self.model["embed_tokens"].weight)

    def new_caches(self, rows: int, length: int) -> list[Tensor]:
        """Empty keys and values, one tensor for each block."""
        config, like = self.config, self.model["embed_tokens"].weight
        shape = (2, rows, config["num_key_value_heads"], length, config["head_dim"])
        return [like.new_zeros(shape) for _ in range(config["num_hidden_layers"])]


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (rows, heads, tokens, head_dim), halves as in transformers."""
    first, second = heads.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def load_llama(folder: Path, device: str, dtype: torch.dtype) -> Llama:
    """The model of a folder; its embeddings must be tied."""
    model = Llama(json.loads((folder / "config.json").read_text()))
    weights: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights |= cast("Any", safetensors.torch).load_file(shard)
    model.load_state_dict(weights)
    return model.to(device, dtype).eval().requires_grad_(False)
