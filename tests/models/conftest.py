"""Tiny checkpoints of every family, random but with an opinion, and transformers' view of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, logging

from p2pinfer.models.checkpoint.checkpoint import Checkpoint, open_checkpoint

_COMMON: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Whatever sets a family apart is switched on, and sized so that it matters within a few hundred tokens.
_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "mlp_bias": True},
    "mistral": {"sliding_window": 40, "head_dim": 20},
    "qwen2": {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 2},
    "qwen3": {"num_key_value_heads": 4, "attention_bias": True},
    "gemma2": {"sliding_window": 30, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}

WriteCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def write_checkpoint() -> WriteCheckpoint:
    """Writes a family's checkpoint into a folder: `write_checkpoint(folder, family, **config_options)`."""
    return _write_checkpoint


@pytest.fixture(scope="session", params=sorted(_OPTIONS))
def family_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny checkpoint of each family in turn."""
    return open_checkpoint(_write_checkpoint(tmp_path_factory.mktemp("model"), request.param), request.param)


@pytest.fixture(scope="session")
def oracle() -> Callable[..., PreTrainedModel]:
    """transformers' model of a folder: `oracle(folder, dtype)`."""
    return _oracle


@cache
def _oracle(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    # SDPA has no soft caps, and some versions of transformers use it for Gemma 2 all the same (5.17).
    model: PreTrainedModel = _auto_model().from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model


def _write_checkpoint(folder: Path, family: str, *, seed: int = 0, **options: Any) -> Path:
    """A folder as transformers saves it; its weights are so large that some logits clearly win."""
    config = AutoConfig.for_model(family, **{**_COMMON, **_OPTIONS[family], **options})
    torch.manual_seed(seed)
    model: PreTrainedModel = _auto_model().from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == "model.norm.weight":
                weight.fill_(6.0)
            elif weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
            elif "embed_tokens" in name:
                # Where the embedding is also the head, a large one makes a model that repeats its input.
                weight.normal_(0, 0.1)
            else:
                weight.normal_(0, 1.2 / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder


def _auto_model() -> Any:
    quiet: Any = logging
    quiet.disable_progress_bar()
    return AutoModelForCausalLM
