"""Reasons for which model types of transformers are refused, beside those that nobody has added.

A session's cache is cut back to an earlier token when a guess was wrong or a hop is replaced. What a family
keeps beside keys and values has to allow that; and from block to block nothing passes but hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_STATE: Final = "its blocks keep a recurrent state, which cannot be cut back to an earlier token"
_STREAMS: Final = "more than one hidden state passes from block to block"
_TOKENS: Final = "its blocks look at the token ids or at other blocks' caches"
_LOOPS: Final = "its blocks run several times"
_LATENT: Final = "its attention caches latent vectors, which is not implemented"
_INDEXED: Final = "its attention chooses keys by an index, which is not implemented"
_LEARNED: Final = "its embedding depends on the token's position"
_IMAGES: Final = "it reads images beside text"

_BY_REASON: Final[Mapping[str, tuple[str, ...]]] = {
    _STATE: (
        "bailing_hybrid",
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lara_mini",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "mamba",
        "mamba2",
        "minimax",
        "nemotron_h",
        "olmo_hybrid",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_next",
        "recurrent_gemma",
        "rwkv",
        "xlstm",
        "zamba",
        "zamba2",
        "zaya",
    ),
    _STREAMS: ("deepseek_v4", "hy_v4", "qwen4_exp"),
    _TOKENS: ("gemma3n", "gemma4", "gemma4_text", "gemma4_unified", "glm_moe_dsa"),
    _LOOPS: ("dory", "hrm_text"),
    _LATENT: ("axk1", "deepseek_v2", "deepseek_v3", "longcat_flash", "minicpm3", "sarvam_mla", "youtu"),
    _INDEXED: ("axk2", "deepseek_v32", "dots3_note", "minimax_m3_vl_text"),
    _LEARNED: ("biogpt", "codegen", "gpt2", "gpt_bigcode", "gpt_neo", "opt", "xglm"),
    _IMAGES: ("gemma3", "llama4", "llava", "mistral3", "mllama", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"),
}
REASONS: Final[Mapping[str, str]] = {
    family: reason for reason, families in _BY_REASON.items() for family in families
}
