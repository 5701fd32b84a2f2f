"""A little model on a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from p2pinfer.models.checkpoint.checkpoint import INDEX
from p2pinfer.models.checkpoint.hub import open_hub
from p2pinfer.models.checkpoint.source import ModelSource

from ..hub_server import HubServer

MODEL = "somebody/little"
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 16,
    "vocab_size": 16,
    "max_position_embeddings": 32,
}
SHARDS = [f"model-{i}.safetensors" for i in range(3)]


def little_model() -> dict[str, bytes]:
    """Three blocks in three shards of 400 KB; the ends lie in the last."""
    save: Any = safetensors.torch.save
    contents = [{f"model.layers.{i}.weight": torch.full((100_000,), float(i))} for i in range(3)]
    contents[2]["model.norm.weight"] = torch.ones(8)
    weight_map = {name: SHARDS[i] for i, tensors in enumerate(contents) for name in tensors}
    files = {SHARDS[i]: save(tensors) for i, tensors in enumerate(contents)}
    files[INDEX] = json.dumps({"weight_map": weight_map}).encode()
    files["config.json"] = json.dumps(CONFIG).encode()
    files["tokenizer.json"] = b"{}"
    files["README.md"] = b"a card"
    return files


def find(hub: HubServer, cache: Path, pauses: list[float] | None = None) -> ModelSource:
    pause = ([] if pauses is None else pauses).append
    return open_hub(MODEL, cache_dir=cache, endpoint=hub.endpoint, pause=pause)
