"""Architecture of a model: its family's row with its config's numbers, all that the forward pass asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from p2pinfer.models.configs.values import FULL, SLIDING

from .activations import ACTIVATIONS
from .families import Family, family_of


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family's row with a config's numbers.

    Attributes:
        windows: By block: how many tokens back it sees, itself included; None: all.
        query_bias: Of queries, keys and values.
        output_bias: Of what attention gives out.
        residual_scale: Factor on what attention and feed-forward layer add.
        logit_scale: Factor on the logits.
        rope_kinds: By block: which of the config's rotary embeddings it has, None for none; empty where the
            config has one for all.
        alibi: Whether scores grow with the key's position (O. Press et al., arXiv 2108.12409).
        expert_size: Inner size of an expert, and of the shared one.
        renormalised: Whether the weights of the chosen experts are scaled to a sum of 1.
        dense_blocks: Those without experts.
        clamp: Factor and limit of gpt-oss's gate; None: `activation(gate) * up`.
    """

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
    windows: tuple[int | None, ...]
    num_experts: int
    experts_per_token: int
    query_bias: bool
    output_bias: bool
    mlp_bias: bool
    embedding_scale: float
    tied_head: bool
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    rope_kinds: tuple[str | None, ...] = ()
    alibi: bool = False
    expert_size: int = 0
    shared_size: int = 0
    renormalised: bool = True
    dense_blocks: frozenset[int] = frozenset()
    clamp: tuple[float, float] | None = None

    @property
    def projections(self) -> Mapping[str, tuple[int, int]]:
        """Products that take a low-rank update, by name: in- and out-features.

        Those that a family stores under other names, or joined, are left out: adapters name them otherwise.
        """
        family, size = self.family, self.head_dim
        queries, keys = self.heads * size, self.kv_heads * size
        shapes: dict[str, tuple[int, int]] = {}
        if len(family.qkv) == 3:
            shapes = dict(
                zip(family.qkv, ((self.hidden_size, each) for each in (queries, keys, keys)), strict=True)
            )
        if family.output == "self_attn.o_proj":
            shapes[family.output] = (queries, self.hidden_size)
        if family.experts is None and family.down == "mlp.down_proj" and family.gate_up[-1] == "mlp.up_proj":
            shapes |= dict.fromkeys(family.gate_up, (self.hidden_size, self.inner_size))
            shapes[family.down] = (self.inner_size, self.hidden_size)
        return shapes


def describe_architecture(config: Mapping[str, Any]) -> Architecture:
    """Architecture that a config, completed by `complete_config`, describes."""
    family = family_of(config)
    bias: bool = config.get("attention_bias", False)
    window = config.get("sliding_window")
    experts: int = config.get("num_local_experts", 0)
    scaled = config["hidden_size"] ** 0.5 if family.scaled_embedding else 1.0
    return Architecture(
        family=family,
        hidden_size=config["hidden_size"],
        inner_size=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        norm_eps=config["rms_norm_eps"] if "rms_norm_eps" in config else config["layer_norm_eps"],
        activation=ACTIVATIONS[config.get("hidden_activation") or config["hidden_act"]],
        attention_scale=config.get("attention_multiplier")
        or config.get("query_pre_attn_scalar", config["head_dim"]) ** -0.5,
        attention_softcap=config.get("attn_logit_softcapping"),
        logit_softcap=config.get("final_logit_softcapping"),
        windows=tuple(window if kind == SLIDING else None for kind in config["layer_types"]),
        num_experts=experts,
        experts_per_token=config.get("num_experts_per_tok", 0),
        query_bias=bias or family.query_bias,
        output_bias=config.get("attention_out_bias", bias and family.output_bias),
        mlp_bias=config.get("mlp_bias", False) or (bias and family.bias_everywhere),
        embedding_scale=config.get("embedding_multiplier", scaled),
        tied_head=config["tie_word_embeddings"],
        residual_scale=config.get("residual_multiplier", 1.0),
        logit_scale=config.get("logit_scale", 1 / config.get("logits_scaling", 1.0)),
        rope_kinds=_rope_kinds(config),
        alibi=config.get("alibi", False),
        expert_size=config.get("moe_intermediate_size", config["intermediate_size"]) if experts else 0,
        shared_size=config.get("shared_expert_intermediate_size", 0),
        renormalised=config.get("norm_topk_prob", True),
        dense_blocks=_dense_blocks(config),
        clamp=(config["swiglu_alpha"], config["swiglu_limit"]) if "swiglu_alpha" in config else None,
    )


def _rope_kinds(config: Mapping[str, Any]) -> tuple[str | None, ...]:
    kinds: tuple[str, ...] = config["layer_types"]
    rope = config["rope_parameters"]
    if "rope_type" not in rope:
        return kinds
    if rope["rope_type"] == "none":
        return (None,) * len(kinds)
    if (rotated := config.get("no_rope_layers")) is not None:
        return tuple("" if each else None for each in rotated)
    if config["model_type"] == "cohere2":
        return tuple(None if kind == FULL else "" for kind in kinds)
    return ()


def _dense_blocks(config: Mapping[str, Any]) -> frozenset[int]:
    """Blocks of a mixture that have one feed-forward layer: Qwen's configs name them, or every so many-th."""
    named: list[int] = config.get("mlp_only_layers") or []
    step: int = config.get("decoder_sparse_step", 1)
    blocks = range(config["num_hidden_layers"])
    return frozenset(index for index in blocks if index in named or (index + 1) % step)
