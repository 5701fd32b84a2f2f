from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.ends import load_ends

from .bounds import bound_of_product


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ends_are_those_of_transformers(
    family_checkpoint: Checkpoint, oracle: Callable[..., PreTrainedModel], dtype: str
) -> None:
    """Embedding scales, offset norms, tied heads and soft caps included."""
    ends = load_ends(family_checkpoint, ComputeConfig(device="cpu", dtype=dtype))
    model: Any = oracle(family_checkpoint.folder, getattr(torch, dtype))
    ids = [3, 77, 198]
    embedded = ends.embed(ids)
    assert embedded.dtype == ends.dtype
    with torch.inference_mode():
        torch.testing.assert_close(embedded, model.model.embed_tokens(torch.tensor(ids)))
        normed = model.model.norm(embedded)
        expected = model.lm_head(normed).float()
        bound = bound_of_product(normed, model.lm_head.weight)
        if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
            expected = (expected / cap).tanh() * cap
    logits = ends.logits(embedded.float())
    assert logits.dtype == torch.float32
    # Two products, of rows that were normed and rounded in two ways. A soft cap only brings numbers nearer.
    assert ((logits - expected).abs() <= 4 * bound).all()


def test_a_head_that_is_missing_is_named(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> None:
    folder = write_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
        load_ends(open_checkpoint(folder, "mine"), ComputeConfig())
