"""Table of model families: the differences between their blocks, and nothing else.

A family is a row: where its norms stand, what they are called, and how its expert layers are laid out.
What a config says in numbers (heads, windows, soft caps) is read from the config, which defaults.py makes
complete. So a family laid out like Llama costs one line
here and a few there, and a checkpoint with a tensor that no rule consumes is refused when it is loaded
(weights.py), not run wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from p2pinfer.models.checkpoint.values import SLIDING

from .activations import ACTIVATIONS


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Names of the tensors of a family's mixture-of-experts layer."""

    router: str
    expert: str  # with {} for the expert's number
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class Family:
    """Differences of a family's block from Llama's; the defaults are Llama's."""

    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention_output_norm: str | None = None  # before the residual is added
    mlp_output_norm: str | None = None
    # queries, keys and values have one, whatever the config says; the output has none
    query_bias: bool = False
    head_norms: bool = False  # each query and key head is normed before it is turned
    norm_offset: float = 0.0  # what the checkpoint leaves out of every norm's weight
    scaled_embedding: bool = False  # by the root of the hidden size
    experts: ExpertNames | None = None


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(query_bias=True),
    "qwen3": Family(head_norms=True),
    "mixtral": Family(
        experts=ExpertNames("block_sparse_moe.gate", "block_sparse_moe.experts.{}", "w1", "w3", "w2")
    ),
    "gemma2": Family(
        mlp_norm="pre_feedforward_layernorm",
        attention_output_norm="post_attention_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
        norm_offset=1.0,
        scaled_embedding=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family's row with a config's numbers: all that the forward pass asks for."""

    family: Family
    hidden_size: int
    inner_size: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    activation: Callable[[Tensor], Tensor]
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    windows: tuple[int | None, ...]  # by block: how many tokens back it sees, itself included; None: all
    num_experts: int
    experts_per_token: int
    query_bias: bool  # of queries, keys and values
    output_bias: bool  # of what attention gives out
    mlp_bias: bool
    embedding_scale: float
    tied_head: bool


def describe_architecture(config: Mapping[str, Any]) -> Architecture:
    """Architecture that a config, completed by `complete_config`, describes."""
    family = FAMILIES[config["model_type"]]
    bias: bool = config.get("attention_bias", False)
    window = config.get("sliding_window")
    return Architecture(
        family=family,
        hidden_size=config["hidden_size"],
        inner_size=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        norm_eps=config["rms_norm_eps"],
        activation=ACTIVATIONS[config.get("hidden_activation") or config["hidden_act"]],
        attention_scale=config.get("query_pre_attn_scalar", config["head_dim"]) ** -0.5,
        attention_softcap=config.get("attn_logit_softcapping"),
        logit_softcap=config.get("final_logit_softcapping"),
        windows=tuple(window if kind == SLIDING else None for kind in config["layer_types"]),
        num_experts=config.get("num_local_experts", 0),
        experts_per_token=config.get("num_experts_per_tok", 0),
        query_bias=bias or family.query_bias,
        output_bias=bias,
        mlp_bias=config.get("mlp_bias", False),
        embedding_scale=config["hidden_size"] ** 0.5 if family.scaled_embedding else 1.0,
        tied_head=config["tie_word_embeddings"],
    )
