"""Reading of each family's config.json: the names of its keys, and what its code has fixed.

A complete config has one vocabulary, Llama's. A row says how a family's own differs from it. The default of
each key stands in family_defaults.json, which `scripts/write_family_defaults.py` takes from transformers'
classes: asking those costs every process that computes 2 s and 110 MB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast

from .not_computed import NotComputed
from .values import FULL, SLIDING


@dataclass(frozen=True, slots=True)
class Rules:
    """Differences of a family's config from Llama's; the defaults are Llama's.

    Attributes:
        names: Its keys that have another name here; where both are there, its own counts.
        also: Keys that are no fields of its config class, and their defaults.
        fixed: Values that its code has, whatever the config says.
        unread: Fields of its config class that its forward pass does not read.
        refused: Fields that are computed only as long as they are harmless.
        layers: Kinds of attention of one block after the other, over and over, where there is a window.
        period_key: Key of the number of blocks after which a full one comes, in place of `layers`.
        rope: One rotary embedding, one for each kind of attention, or none.
        local_theta: Base of sliding blocks, where each kind has its own.
        partial_rotary: Part of a head that is rotated if the config does not say; None: always all of it.
        unrotated: Kind of attention without rotation.
        default_rope: The rope of a config that names none, if it has a type of its own.
        rope_types: Types that transformers takes, where not all.
        original_positions: Default of `original_max_position_embeddings` beside the rope.
        restarts_long: True if transformers computes all keys again where a text passes the original length.
        activations: What it means by the name of an activation, where that is another function.
        needs_window: True if its blocks slide whatever the window is.
        slides_first: True if the blocks before `max_window_layers` slide, and not those from it on.
    """

    names: Mapping[str, str] = field(default_factory=dict[str, str])
    also: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fixed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    unread: frozenset[str] = frozenset()
    refused: Mapping[str, NotComputed] = field(default_factory=dict[str, NotComputed])
    layers: tuple[str, ...] = (SLIDING,)
    period_key: str = ""
    rope: Literal["one", "by kind", "none"] = "one"
    local_theta: float = 10_000.0
    partial_rotary: float | None = None
    unrotated: str = ""
    default_rope: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rope_types: frozenset[str] = frozenset()
    original_positions: int = 0
    restarts_long: bool = False
    activations: Mapping[str, str] = field(default_factory=dict[str, str])
    needs_window: bool = False
    slides_first: bool = False


_ROUTED: Final = {"num_experts": "num_local_experts"}
_AFTER_NORM: Final = NotComputed((None, False), "its residuals would be taken after the norm")
_NORM_OF_EACH: Final = NotComputed((None, False), "each head would have a norm of its own")
_CLIPPED: Final = NotComputed((None,), "queries, keys and values would be clipped")

RULES: Final[Mapping[str, Rules]] = {
    "llama": Rules(),
    "mistral": Rules(also={"layer_types": None}),
    "mixtral": Rules(names=_ROUTED),
    "qwen2": Rules(),
    "qwen3": Rules(),
    "gemma": Rules(activations={"gelu": "gelu_pytorch_tanh"}),
    "gemma2": Rules(layers=(SLIDING, FULL), needs_window=True),
    "gemma3_text": Rules(
        unread=frozenset({"attn_logit_softcapping"}),
        layers=(*[SLIDING] * 5, FULL),
        period_key="sliding_window_pattern",
        needs_window=True,
        rope="by kind",
    ),
    "phi3": Rules(
        partial_rotary=1.0,
        rope_types=frozenset({"default", "longrope"}),
        original_positions=4096,
        restarts_long=True,
    ),
    "phi": Rules(
        names={"qk_layernorm": "use_qk_norm"},
        fixed={"attention_bias": True, "mlp_bias": True},
        partial_rotary=0.5,
    ),
    "olmo2": Rules(),
    "olmo3": Rules(layers=(*[SLIDING] * 3, FULL), needs_window=True, rope="by kind", local_theta=5e5),
    "olmoe": Rules(names=_ROUTED, refused={"clip_qkv": _CLIPPED}),
    "granite": Rules(),
    "qwen2_moe": Rules(
        names={**_ROUTED, "qkv_bias": "attention_bias"}, layers=(SLIDING, FULL), slides_first=True
    ),
    "qwen3_moe": Rules(names=_ROUTED),
    "glm": Rules(partial_rotary=0.5),
    "glm4": Rules(partial_rotary=0.5),
    "starcoder2": Rules(names={"norm_epsilon": "layer_norm_eps", "use_bias": "attention_bias"}),
    "cohere": Rules(),
    "cohere2": Rules(
        fixed={"head_dim": None},
        layers=(*[SLIDING] * 3, FULL),
        period_key="sliding_window_pattern",
        needs_window=True,
        unrotated=FULL,
    ),
    "falcon": Rules(
        names={
            "n_embed": "hidden_size",
            "num_kv_heads": "num_key_value_heads",
            "ffn_hidden_size": "intermediate_size",
            "layer_norm_epsilon": "layer_norm_eps",
            "activation": "hidden_act",
            "bias": "attention_bias",
        },
        fixed={"head_dim": None},
    ),
    "bloom": Rules(
        names={
            "n_embed": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "layer_norm_epsilon": "layer_norm_eps",
            "seq_length": "max_position_embeddings",
        },
        fixed={
            "head_dim": None,
            "num_key_value_heads": None,
            "intermediate_size": None,
            "hidden_act": "gelu_pytorch_tanh",
            "attention_bias": True,
            "alibi": True,
        },
        unread=frozenset({"pretraining_tp", "slow_but_exact"}),  # another order of the same sums
        refused={"apply_residual_connection_post_layernorm": _AFTER_NORM},
        rope="none",
    ),
    "gpt_neox": Rules(
        names={"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
        fixed={"num_key_value_heads": None, "mlp_bias": True},
        partial_rotary=0.25,
    ),
    "stablelm": Rules(
        names={"use_qkv_bias": "attention_bias"},
        refused={"qk_layernorm": _NORM_OF_EACH},
        partial_rotary=0.25,
    ),
    "arcee": Rules(),
    "seed_oss": Rules(),
    "smollm3": Rules(),
    "gpt_oss": Rules(
        names=_ROUTED,
        fixed={"hidden_act": "silu"},
        layers=(SLIDING, FULL),
        needs_window=True,
        default_rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
}
FAMILIES: Final = frozenset(RULES)
# Those whose feed-forward layers have two products, not three.
UNGATED: Final = frozenset({"arcee", "bloom", "falcon", "gpt_neox", "phi", "starcoder2"})


def _read_defaults() -> Mapping[str, Mapping[str, Any]]:
    path = Path(__file__).with_name("family_defaults.json")
    return cast("dict[str, dict[str, Any]]", json.loads(path.read_text(encoding="utf-8")))


# By family, every key that its forward pass reads, in the one vocabulary, and the value where it is left out.
DEFAULTS: Final = _read_defaults()
