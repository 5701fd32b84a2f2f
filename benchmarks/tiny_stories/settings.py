"""What the stages share: the student's shape, the tokens that mark things, and every option."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PAD, BOS, EOS = 0, 1, 2  # the student's <pad> <s> </s>; the teacher has the last two in the same places

STUDENT: dict[str, Any] = {
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 40,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Every option of every stage; `help` is what the command line says of it."""

    teacher: str = field(default="stories15M", metadata={"help": "the teacher's folder"})
    heldout: str = field(default="heldout.txt", metadata={"help": "real stories, one line break apart"})
    work: str = field(default="work", metadata={"help": "where the stages hand files over"})
    out: str = field(default="tiny-stories", metadata={"help": "the student's folder"})
    init: str = field(default="", metadata={"help": "a student to go on from, with its tokenizer"})
    gen_seconds: float = field(default=255.0, metadata={"help": "how long to generate"})
    train_seconds: float = field(default=550.0, metadata={"help": "how long to train"})
    rows: int = field(default=8192, metadata={"help": "stories written at a time"})
    chunk: int = field(default=1024, metadata={"help": "tokens a row between two looks at the clock"})
    cool: float = field(default=0.8, metadata={"help": "temperature of half the stories; 1 of the others"})
    min_p: float = field(default=0.02, metadata={"help": "least share of the likeliest token's probability"})
    prompted: float = field(default=0.35, metadata={"help": "share of stories with a given opening"})
    novelty: float = field(default=0.85, metadata={"help": "least share of different four-word runs"})
    length: int = field(default=1024, metadata={"help": "tokens of a training row"})
    batch: int = field(default=128, metadata={"help": "rows of a training step"})
    lr: float = field(default=3e-3, metadata={"help": "highest learning rate"})
    seed: int = field(default=0, metadata={"help": "of everything random"})
    workers: int = field(default=os.cpu_count() or 1, metadata={"help": "processes that filter and encode"})
    eval_docs: int = field(default=10**9, metadata={"help": "held-out stories to use"})
    eval_dtype: str = field(default="float32", metadata={"help": "to evaluate in"})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "to train and evaluate on"}
    )

    def in_work(self, name: str) -> Path:
        """A file that one stage leaves for another."""
        return Path(self.work) / name
