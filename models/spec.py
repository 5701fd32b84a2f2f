"""What a model is: its shape, and a name that is the same on every peer that holds the same weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from blake3 import blake3

from p2pinfer.errors import CheckpointError, SpanOutOfRange

from .span import BlockSpan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Every model_type that has an adapter. A plain list, because the adapters import torch and this must not.
FAMILIES = frozenset({"gemma2", "llama", "mistral", "mixtral", "qwen2", "qwen3"})
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

# Keys that transformers changes with its own version or with where the folder lay.
_VOLATILE_KEYS = frozenset({"_commit_hash", "_name_or_path", "transformers_version"})
_MAX_CONFIG_BYTES = 1 << 20
_LIMITS = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 26,
    "max_position_embeddings": 1 << 40,
}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a model and the content address of its weights."""

    model: str  # for people: what was typed, the hub id, the folder's name
    revision: str  # 32 hex digits; equal on two peers only if config and every shard are
    family: str  # the config's model_type
    dtype: str  # the checkpoint's own
    num_blocks: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    kv_heads: int
    head_dim: int
    block_parameters: int  # weights of one block, norms and biases left out

    def kv_bytes_per_token_per_block(self, dtype: str | None = None) -> int:
        """What a cached token costs in one block, keys and values; in the checkpoint's dtype unless given."""
        return 2 * self.kv_heads * self.head_dim * DTYPE_BYTES[dtype or self.dtype]

    def check_span(self, span: BlockSpan) -> None:
        """Nothing, if the model has these blocks.

        Raises:
            SpanOutOfRange: It has not.
        """
        if span.stop > self.num_blocks:
            raise SpanOutOfRange(
                f"{self.model} has the blocks 0:{self.num_blocks}, so {span} is out of range"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        CheckpointError: It is missing or is no JSON object.
    """
    config = read_json(folder / "config.json")
    if config is None:
        raise CheckpointError(f"{folder} holds no config.json: it is no model folder")
    return config


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is no such file.

    Raises:
        CheckpointError: The file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} cannot be read as JSON: {exc}; fetch it again") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it again")
    return cast("dict[str, Any]", content)


def model_spec(
    model: str, config: Mapping[str, Any], shard_sha256: Mapping[str, str], *, stored_dtype: str = "float32"
) -> ModelSpec:
    """The spec of the model that `config` (config.json as it is) and these shards make.

    Args:
        model: The name for people.
        shard_sha256: The sha256 in hex of every safetensors shard, by file name.
        stored_dtype: What counts where the config names no dtype.

    Raises:
        CheckpointError: The family is unknown, the weights are quantised, or a size makes no sense.
    """
    family = _family(model, config)
    sizes: dict[str, Any] = {key: config.get(key) for key in _LIMITS}
    if None in sizes.values():
        # What a config leaves out, its family decides; only transformers knows how, and takes 2 s to import.
        complete = pretrained_config(model, config)
        sizes = {key: getattr(complete, key, None) for key in _LIMITS}
        sizes["head_dim"] = sizes["head_dim"] or complete.hidden_size // complete.num_attention_heads
    for key, limit in _LIMITS.items():
        if type(sizes[key]) is not int or not 0 < sizes[key] <= limit:
            raise CheckpointError(f"the config of {model} says {key} = {sizes[key]!r}, which no model has")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or stored_dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{model} is stored as {dtype}; p2pinfer reads {', '.join(DTYPE_BYTES)}")
    return ModelSpec(
        model=model,
        revision=revision_of(config, shard_sha256),
        family=family,
        dtype=dtype,
        num_blocks=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        vocab_size=sizes["vocab_size"],
        max_positions=sizes["max_position_embeddings"],
        kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        block_parameters=_block_parameters(sizes, config),
    )


def revision_of(config: Mapping[str, Any], shard_sha256: Mapping[str, str]) -> str:
    """The content address of a model: 32 hex digits of blake3 over its config and its shards' hashes."""
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
    lines = [json.dumps(kept, sort_keys=True, separators=(",", ":"))]
    lines += [f"{name} {sha256}" for name, sha256 in sorted(shard_sha256.items())]
    return blake3("\n".join(lines).encode()).hexdigest()[:32]


def pretrained_config(model: str, config: Mapping[str, Any]) -> PretrainedConfig:
    """The config as transformers sees it, defaults filled in; never runs code of the checkpoint's.

    Raises:
        CheckpointError: transformers does not know the family or refuses a value.
    """
    # transformers and torch take 2 s to import; a client that only watches the swarm never comes here.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        family: Any = CONFIG_MAPPING[config["model_type"]]
        complete: PretrainedConfig = family.from_dict(dict(config))
    except Exception as exc:  # whatever its validators raise, the answer is the same
        raise CheckpointError(f"transformers cannot use the config of {model}: {exc}") from exc
    return complete


def _block_parameters(sizes: Mapping[str, int], config: Mapping[str, Any]) -> int:
    heads = 2 * (sizes["num_attention_heads"] + sizes["num_key_value_heads"]) * sizes["head_dim"]
    experts = config.get("num_local_experts")
    feed_forward = 3 * sizes["intermediate_size"] * (experts if type(experts) is int and experts > 0 else 1)
    return sizes["hidden_size"] * (heads + feed_forward)


def _family(model: str, config: Mapping[str, Any]) -> str:
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(
            f"{model} is of family {family!r}, which p2pinfer does not run; it runs {known}"
        )
    if "quantization_config" in config:
        raise CheckpointError(
            f"the weights of {model} are quantised; use a float32, float16 or bfloat16 checkpoint"
        )
    return family
