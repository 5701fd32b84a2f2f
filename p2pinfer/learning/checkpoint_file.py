"""Checkpoint of a training: one file with all that it takes to go on, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, cast

from torch import Tensor

from p2pinfer.errors import ConfigError
from p2pinfer.models.learning.tensor_files import read_tensors, write_tensors

CHECKPOINT_FILE: Final = "checkpoint.safetensors"
_KEY: Final = "p2pinfer_training"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Settings that a training cannot change on its way, by the names that users know."""

    model: str
    revision: str
    data: str
    method: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    prompt_tokens: int
    batch_rows: int
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """State of a training after some steps.

    Attributes:
        losses: One for each step.
        tensors: Values of the adapter and of its optimiser.
    """

    fingerprint: Fingerprint
    losses: tuple[float, ...]
    tensors: dict[str, Tensor]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Put a checkpoint in place of the former one.

    Raises:
        LocalError: It cannot be written; the former one stays.
    """
    told = {"fingerprint": asdict(checkpoint.fingerprint), "losses": checkpoint.losses}
    write_tensors(folder / CHECKPOINT_FILE, checkpoint.tensors, {_KEY: json.dumps(told)})


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The folder's checkpoint; None if it has none.

    Raises:
        ConfigError: It is damaged, or no checkpoint of a training.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        return None
    try:
        tensors, metadata = read_tensors(path)
        told = json.loads(metadata[_KEY])
        fingerprint = dict(told["fingerprint"])
        fingerprint["targets"] = tuple(fingerprint["targets"])
        return Checkpoint(Fingerprint(**fingerprint), tuple(map(float, told["losses"])), tensors)
    except (KeyError, TypeError, ValueError) as exc:
        raise ConfigError(f"{path} is no checkpoint of a training: {exc}; name another folder") from exc


def check_same(kept: Fingerprint, asked: Fingerprint) -> None:
    """Nothing, if a training may go on with these settings.

    Raises:
        ConfigError: One of them is another than it was.
    """
    was, now = asdict(kept), cast("Mapping[str, object]", asdict(asked))
    for name, value in was.items():
        if now[name] != value:
            if name == "data":
                raise ConfigError(
                    "the examples are not those that this training began with; name another --out"
                )
            raise ConfigError(
                f"this training began with {name} = {value}, and {now[name]} is asked for; give it as it "
                "was, or name another --out"
            )
