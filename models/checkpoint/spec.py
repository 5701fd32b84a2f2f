"""Shape of a model, and its revision: a name that is equal only where weights are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from p2pinfer.errors import CheckpointError, SpanOutOfRange
from p2pinfer.models.configs.defaults import complete_config, max_positions
from p2pinfer.models.configs.family_rules import UNGATED
from p2pinfer.models.configs.numbers import numbers_of, revision_digest, weights_digest
from p2pinfer.models.configs.rope_config import prompt_limit
from p2pinfer.models.numerics import CODECS, Numerics, plain
from p2pinfer.models.span import BlockSpan
from p2pinfer.text_files import is_text

MARK: Final = "+"  # between a revision and the name of an adapter


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a model and the content address of its weights."""

    model: str  # for people: what was typed, the hub id, the folder's name
    revision: str  # 32 hex digits; equal on two peers only if weights and numbers are
    family: str  # the config's model_type
    dtype: str  # of the checkpoint's files
    num_blocks: int
    hidden_size: int
    vocab_size: int
    max_positions: int  # tokens of a text, with what rope scaling adds
    kv_heads: int
    head_dim: int
    block_parameters: int  # weights of one block, norms and biases left out
    weights: str = ""  # 32 hex digits; equal on two peers only if every shard is
    numbers: str = ""  # what the config says about the forward pass, as `numbers_of` spells it
    prompt_limit: int | None = None  # tokens of a prompt where that is less: see `rope_config.prompt_limit`

    @property
    def numerics(self) -> Numerics:
        """Numerics of a span that is held and computed as the checkpoint is stored."""
        return plain(self.dtype)

    def block_bytes(self, numerics: Numerics | None = None) -> int:
        """Bytes of one block's weights in memory, norms and biases left out; as in the files unless given."""
        return (numerics or self.numerics).weight_bytes(self.block_parameters)

    def kv_bytes_per_token_per_block(self, numerics: Numerics | None = None) -> int:
        """Bytes of a cached token's keys and values in one block; in the checkpoint's dtype unless given."""
        return 2 * self.kv_heads * self.head_dim * (numerics or self.numerics).bytes_per_value

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
        raise CheckpointError(f"{folder} has no config.json, so it is not a model folder")
    return config


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is no such file.

    Raises:
        CheckpointError: The file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())  # which knows byte order marks
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} cannot be read as JSON: {exc}; fetch it again") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; fetch it again")
    return cast("dict[str, Any]", _as_text(content))


def _as_text(value: Any) -> Any:
    """`value` with U+FFFD for every half of a surrogate pair: JSON can say it, and no encoding write it."""
    match value:
        case str():
            return (
                value
                if is_text(value)
                else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            )
        case dict():
            entries = cast("dict[str, Any]", value).items()
            return {_as_text(name): _as_text(entry) for name, entry in entries}
        case list():
            return [_as_text(part) for part in cast("list[object]", value)]
        case _:
            return value


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
    complete = complete_config(model, config)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or stored_dtype).removeprefix("torch.")
    if dtype not in CODECS:
        raise CheckpointError(f"{model} is stored as {dtype:.40}; p2pinfer reads {', '.join(CODECS)}")
    weights, numbers = weights_digest(shard_sha256), numbers_of(config)
    return ModelSpec(
        model=model,
        revision=revision_digest(weights, numbers),
        family=complete["model_type"],
        dtype=dtype,
        num_blocks=complete["num_hidden_layers"],
        hidden_size=complete["hidden_size"],
        vocab_size=complete["vocab_size"],
        max_positions=max_positions(complete),
        kv_heads=complete["num_key_value_heads"],
        head_dim=complete["head_dim"],
        block_parameters=_block_parameters(complete),
        weights=weights,
        numbers=numbers,
        prompt_limit=prompt_limit(complete["rope_parameters"]),
    )


def revision_of(config: Mapping[str, Any], shard_sha256: Mapping[str, str]) -> str:
    """The content address of a model: its shards' hashes, and what of its config changes what it computes.

    Raises:
        CheckpointError: The config cannot be used.
    """
    return revision_digest(weights_digest(shard_sha256), numbers_of(config))


def _block_parameters(complete: Mapping[str, Any]) -> int:
    """Weights of the largest block's products."""
    heads = 2 * (complete["num_attention_heads"] + complete["num_key_value_heads"]) * complete["head_dim"]
    inner = complete["intermediate_size"]
    if experts := complete.get("num_local_experts", 0):
        of_all = experts * complete.get("moe_intermediate_size", inner)
        of_all += complete.get("shared_expert_intermediate_size", 0)
        # Of some families a few blocks have no experts.
        inner = max(of_all, inner) if complete.get("mlp_only_layers") else of_all
    products = 2 if complete["model_type"] in UNGATED else 3
    block_parameters: int = complete["hidden_size"] * (heads + products * inner)
    return block_parameters
