"""What the bundled model says when nobody is in between."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import p2pinfer.models
from p2pinfer.models.text.text import load_tokenizer

TINY_STORIES = Path(p2pinfer.models.__path__[0]) / "tiny-stories"


@cache
def greedy_ids(prompt: str, tokens: int) -> tuple[int, ...]:
    """The likeliest tokens after a prompt, as transformers computes them in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    models: Any = AutoModelForCausalLM
    model = models.from_pretrained(TINY_STORIES, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([load_tokenizer(TINY_STORIES).encode(prompt)])
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    return tuple(output[0, ids.shape[1] :].tolist())
