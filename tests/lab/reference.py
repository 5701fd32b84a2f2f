"""What the bundled model says when nobody is in between."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import p2pinfer.models
from p2pinfer.models.text.text import load_tokenizer

TINY_STORIES = Path(p2pinfer.models.__path__[0]) / "tiny-stories"


def lengthened(folder: Path, context: int) -> Path:
    """The bundled model's files in `folder`, with room for `context` tokens.

    It was trained on 1,024, so what it writes after more makes no sense; transformers says the same, though.
    """
    shutil.copytree(TINY_STORIES, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    changed = config | {"max_position_embeddings": context}
    (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    return folder


@cache
def greedy_ids(prompt: str, tokens: int, folder: Path = TINY_STORIES) -> tuple[int, ...]:
    """The likeliest tokens after a prompt, as transformers computes them in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    models: Any = AutoModelForCausalLM
    model = models.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([load_tokenizer(folder).encode(prompt)])
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    return tuple(output[0, ids.shape[1] :].tolist())
