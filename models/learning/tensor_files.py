"""Files that are whole or not there, also after a power failure: written beside, then renamed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from p2pinfer.errors import LocalError


def write_file(path: Path, content: bytes) -> None:
    """Put `content` in place of what the file holds.

    Raises:
        LocalError: It cannot be written; what was there stays.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as exc:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise LocalError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def write_tensors(path: Path, values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors; raises as `write_file` does."""
    files: Any = safetensors.torch
    plain = {name: each.detach().cpu().contiguous() for name, each in values.items()}
    write_file(path, files.save(plain, metadata=dict(metadata)))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a safetensors file, and its metadata.

    Raises:
        ValueError: It is no such file, or cannot be read.
    """
    open_file: Any = safetensors.safe_open
    try:
        with open_file(path, framework="pt") as file:
            names: list[str] = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as exc:
        raise ValueError(str(exc)) from exc
