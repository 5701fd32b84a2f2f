"""Adapters in peft's files: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from p2pinfer.errors import LocalError
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.compute.architecture import Architecture
from p2pinfer.models.learning.adapter import LowRank
from p2pinfer.models.learning.peft_lora import CONFIG_FILE, REVISION, WEIGHTS_FILE
from p2pinfer.models.learning.tensor_files import write_file, write_tensors

from .tuned_adapter import TunedAdapter


def save_adapter(adapter: TunedAdapter, spec: ModelSpec, architecture: Architecture, folder: Path) -> None:
    """Write peft's files, each whole or not at all.

    Raises:
        LocalError: They cannot be written.
    """
    common: dict[str, Any] = {
        "base_model_name_or_path": spec.model,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }
    values: dict[str, Tensor] = {}
    if adapter.prompt is not None:
        values["prompt_embeddings"] = adapter.prompt
        config = common | _prompt_config(adapter.prompt, spec, architecture)
    else:
        for index, update in enumerate(adapter.updates):
            name = f"base_model.model.model.layers.{update.block}.{update.projection}.lora_"
            values[f"{name}A.weight"], values[f"{name}B.weight"] = adapter.factors[2 * index : 2 * index + 2]
        config = common | _lora_config(adapter.updates)
    write_tensors(folder / WEIGHTS_FILE, values, {"format": "pt", REVISION: spec.revision})
    write_file(folder / CONFIG_FILE, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _lora_config(updates: tuple[LowRank, ...]) -> dict[str, Any]:
    first = updates[0]
    return {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": first.scale * first.rank,
        "target_modules": sorted({each.projection.rpartition(".")[2] for each in updates}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
    }


def _prompt_config(prompt: Tensor, spec: ModelSpec, architecture: Architecture) -> dict[str, Any]:
    return {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": len(prompt),
        "token_dim": prompt.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": architecture.heads,
        "num_layers": spec.num_blocks,
        "prompt_tuning_init": "RANDOM",
    }


def ensure_folder(folder: Path) -> None:
    """Make a folder for files of a training.

    Raises:
        LocalError: It cannot be made, or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise LocalError(f"{folder} cannot be made: {exc.strerror or exc}") from exc
    if not os.access(folder, os.W_OK):
        raise LocalError(f"{folder} cannot be written to; name another folder")
