from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from p2pinfer.models.rope import Rope, rotate

SCALED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("rope_type", SCALED)
def test_heads_are_turned_as_transformers_turns_them(rope_type: str) -> None:
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **SCALED[rope_type]}
    config: Any = LlamaConfig(
        hidden_size=96, num_attention_heads=4, rope_parameters=parameters, max_position_embeddings=256
    )
    positions = torch.tensor([5, 0, 200, 63, 64])
    heads = torch.randn(5, 4, 24, generator=torch.Generator().manual_seed(0))
    llama: Any = modeling_llama
    cos, sin = llama.LlamaRotaryEmbedding(config)(heads, positions[None])
    expected, _ = llama.apply_rotary_pos_emb(heads, heads, cos[0], sin[0], unsqueeze_dim=1)
    rotate(heads, Rope(config, torch.device("cpu")).at(positions, torch.float32))
    torch.testing.assert_close(heads, expected)
