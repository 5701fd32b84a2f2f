"""The same models as transformers and peft have them on one machine, and what both are given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

peft: Any = pytest.importorskip("peft", reason="what adapts these models: pip install '.[dev]'")
library: Any = transformers

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def local(folder: Path, auto: str = "AutoModelForCausalLM", **options: Any) -> Any:
    """The model of a folder, whole."""
    return getattr(library, auto).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Padded on the left and on the right."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 199, (3, 55))
    mask = torch.ones_like(ids)
    mask[1, :20], mask[2, 41:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 20] = -100
    ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def adapted(model: Any, config: Any) -> Any:
    """A model with an adapter, whose first values are the same each time."""
    torch.manual_seed(7)
    return peft.get_peft_model(model, config)


def trained(model: Any) -> Iterator[Tensor]:
    """The parameters that are trained, in the order of their names."""
    return (each for _, each in sorted(model.named_parameters()) if each.requires_grad)
