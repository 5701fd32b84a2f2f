"""LoRA in peft's files, read: adapter_config.json and adapter_model.safetensors.

They are read without peft, and come from strangers: the weights are safetensors, which cannot run code, and
whatever would be applied otherwise than peft applies it is refused with a sentence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor

from p2pinfer.errors import ConfigError
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.compute.architecture import Architecture
from p2pinfer.text_files import read_text

from .adapter import LowRank, projection_shape
from .tensor_files import read_tensors

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
REVISION: Final = "p2pinfer_revision"  # in the weights' metadata: hash of the base model's weights
MAX_BYTES: Final = 4 << 30
_PICKLED: Final = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
_NAME: Final = re.compile(
    r"base_model\.model\.(?:model\.)?layers\.(\d+)\.((?:self_attn|mlp)\.\w+)\.lora_([AB])\.weight"
)
_PLAIN_PATTERN: Final = re.compile(r"\^?[\w.]{1,200}\$?")
_OFF: Final = {  # what would change the numbers in a way that is not applied here
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "target_parameters": "target_parameters, which are experts'",
    "modules_to_save": "modules_to_save, which are whole weights of the model",
    "trainable_token_indices": "trainable tokens",
    "lora_bias": "biases",
    "layer_replication": "layer_replication",
    "alora_invocation_tokens": "an invocation (aLoRA)",
    "corda_config": "a base that was changed for it (CorDA)",
    "eva_config": "EVA",
    "arrow_config": "Arrow",
}
_CHANGED_BASE: Final = ("pissa", "olora", "corda", "loftq")  # initialisations that change the base model


class Lora(NamedTuple):
    """Low-rank updates of a model, and A and B of each of them in turn, float32."""

    updates: tuple[LowRank, ...]
    factors: tuple[Tensor, ...]


def read_lora(folder: Path, spec: ModelSpec, architecture: Architecture) -> Lora:
    """LoRA from peft's files, for the model of `spec`.

    Raises:
        ConfigError: It is no LoRA, for another model, pickled, too large, or of a kind that is not applied
            here.
    """
    config = _read_config(folder)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{folder} holds a {kind}; on the swarm, texts take adapters of the type LORA")
    _check_plain(folder, config)
    tensors = _read_tensors(folder, spec)
    pairs: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise ConfigError(f"{folder} changes {name:.100}, which takes no LoRA on the swarm")
        block, projection, which = int(found[1]), found[2], found[3]
        if block >= spec.num_blocks:
            raise ConfigError(
                f"{folder} changes block {block}; {spec.model} has {spec.num_blocks}, so this adapter is for "
                "another model"
            )
        pairs.setdefault((block, projection), {})[which] = tensor
    scale_of = _scales(folder, config)
    updates: list[LowRank] = []
    factors: list[Tensor] = []
    for (block, projection), pair in sorted(pairs.items()):
        where = f"{folder}: block {block}, {projection}"
        down, up = _checked_pair(where, projection, pair, architecture)
        updates.append(LowRank(block, projection, len(down), scale_of(block, projection, len(down))))
        factors += [down, up]
    if not updates:
        raise ConfigError(f"{folder} has an adapter that changes nothing")
    return Lora(tuple(updates), tuple(factors))


def _checked_pair(
    where: str, projection: str, pair: Mapping[str, Tensor], architecture: Architecture
) -> tuple[Tensor, Tensor]:
    try:
        inputs, outputs = projection_shape(architecture, projection)
    except ValueError as exc:
        raise ConfigError(f"{where}: {exc}") from exc
    if set(pair) != {"A", "B"}:
        raise ConfigError(f"{where} has only one of A and B; the file is incomplete")
    down, up = pair["A"], pair["B"]
    rank = down.shape[0] if down.dim() == 2 else 0
    if rank < 1 or down.shape != (rank, inputs) or up.shape != (outputs, rank):
        raise ConfigError(
            f"{where} has shapes {tuple(down.shape)} and {tuple(up.shape)}; this model takes (rank, "
            f"{inputs}) and ({outputs}, rank), so the adapter is for another one"
        )
    for each in (down, up):
        if not each.is_floating_point() or not bool(torch.isfinite(each).all()):
            raise ConfigError(f"{where} has values that are no finite numbers")
    return down.float(), up.float()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {CONFIG_FILE}, so it is no adapter in peft's form")
    try:
        found: object = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is no JSON object")
    told = cast("dict[str, Any]", found)
    if not isinstance(told.get("alpha_pattern") or {}, dict):
        raise ConfigError(f"{path}: alpha_pattern has to be an object")
    return told


def _check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    for name, kind in _OFF.items():
        if config.get(name):
            raise ConfigError(f"{folder} has {kind}, which is not applied on the swarm; use plain LoRA")
    if config.get("bias", "none") != "none":
        raise ConfigError(f"{folder} has biases, which are not applied on the swarm; set bias to none")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise ConfigError(
            f"{folder} was begun with {start:.20}, which changes the base model; convert it to plain LoRA "
            "when saving (path_initial_model_for_weight_conversion)"
        )


def _read_tensors(folder: Path, spec: ModelSpec) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = next((name for name in _PICKLED if (folder / name).exists()), None)
        if pickled is not None:
            raise ConfigError(
                f"{folder} has its weights in {pickled}, a pickle, which could run code; save it again with "
                "safe_serialization=True"
            )
        raise ConfigError(f"{folder} holds no {WEIGHTS_FILE}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ConfigError(f"{path} has {size} bytes; an adapter may have {MAX_BYTES}")
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as exc:
        raise ConfigError(f"{path} is damaged: {exc}") from exc
    revision = metadata.get(REVISION)
    if revision is not None and revision != spec.revision:
        raise ConfigError(
            f"{folder} was trained on other weights ({revision:.12}) than those of {spec.model} "
            f"({spec.revision:.12})"
        )
    return tensors


def _scales(folder: Path, config: Mapping[str, Any]) -> Callable[[int, str, int], float]:
    """Factor of an update by its block, projection and rank, as peft computes it."""
    patterns: dict[str, Any] = config.get("alpha_pattern") or {}
    alpha = _number(folder, config.get("lora_alpha"))
    known: list[tuple[re.Pattern[str], float]] = []
    for pattern, value in patterns.items():
        # Names, as peft writes them. A pattern of a stranger's that repeats may take for ever to match.
        if _PLAIN_PATTERN.fullmatch(pattern) is None:
            raise ConfigError(f"{folder}: alpha_pattern has {pattern:.60}, which is no name of a module")
        known.append((re.compile(rf"(.*\.)?({pattern})"), _number(folder, value)))

    def scale(block: int, projection: str, rank: int) -> float:
        name = f"model.layers.{block}.{projection}"
        found = next((value for pattern, value in known if pattern.fullmatch(name)), alpha)
        return found / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale


def _number(folder: Path, value: object) -> float:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    raise ConfigError(f"{folder}: lora_alpha and alpha_pattern have to be numbers")
