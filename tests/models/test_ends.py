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
        expected = model.lm_head(model.model.norm(embedded)).float()
        if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
            expected = (expected / cap).tanh() * cap
    logits = ends.logits(embedded.float())
    assert logits.dtype == torch.float32
    tolerance = 1e-4 if dtype == "float32" else 0.15
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)


def test_a_head_that_is_missing_is_named(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> None:
    folder = write_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
        load_ends(open_checkpoint(folder, "mine"), ComputeConfig())
