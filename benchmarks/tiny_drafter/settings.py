"""What the stages share: the drafter's shape, and every option."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

BOS, EOS = 1, 2  # of the target's tokenizer

# What it has of its own; everything else is the target's.
SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Every option; `help` is what the command line says of it."""

    target: str = field(default="models/tiny-stories", metadata={"help": "folder of the model to guess for"})
    out: str = field(default="tiny-stories-drafter", metadata={"help": "the drafter's folder"})
    write_seconds: float = field(default=50.0, metadata={"help": "how long the target writes"})
    train_seconds: float = field(default=95.0, metadata={"help": "how long to train"})
    rows: int = field(default=4096, metadata={"help": "rows written at a time"})
    length: int = field(default=1024, metadata={"help": "tokens of a row"})
    batch: int = field(default=64, metadata={"help": "rows of a training step"})
    held: int = field(default=256, metadata={"help": "rows to judge by, at most an eighth of the first ones"})
    lr: float = field(default=3e-3, metadata={"help": "highest learning rate"})
    seed: int = field(default=0, metadata={"help": "of everything random"})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "to compute on"}
    )

    @property
    def dtype(self) -> torch.dtype:
        """What the target computes in."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def target_folder(self) -> Path:
        """Folder of the target."""
        return Path(self.target)
