"""Texts of transformers' generate over blocks of a swarm: they are those of one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pinfer.hf.remote_layers import RemoteLayers

from .one_machine import ALL_LINEAR, adapted, batch, local, peft
from .support import distributed

# The libraries warn of what they do to each other.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generated_ids_are_those_of_transformers(
    folder: Path, options: dict[str, Any], use_cache: bool
) -> None:
    asked = batch()
    prompt = {name: asked[name][:2, :30] for name in ("input_ids", "attention_mask")}
    ours, theirs = distributed(folder), local(folder)
    found: list[Tensor] = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        found.append(model.generate(**prompt, max_new_tokens=6, use_cache=use_cache, **options))
    assert torch.equal(*found)
    assert len(ours.model.layers.passes.trainer.steps) == (6 if use_cache else 0)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (peft.LoraConfig(r=4, target_modules=ALL_LINEAR, init_lora_weights=False, task_type="CAUSAL_LM"), 6),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), 0),
    ],
)
def test_what_peft_has_wrapped_generates_what_it_does_on_one_machine(
    llama: Path, config: Any, steps: int
) -> None:
    asked = batch()
    prompt = {name: asked[name][:2, :30] for name in ("input_ids", "attention_mask")}
    ours, theirs = adapted(distributed(llama), config), adapted(local(llama), config)
    found = [ours.generate(**prompt, max_new_tokens=6)]
    found.append(theirs.generate(**prompt, max_new_tokens=6, use_cache=False))
    assert torch.equal(*found)
    [layers] = [each for each in ours.modules() if isinstance(each, RemoteLayers)]
    blocks: Any = layers.passes.trainer
    assert len(blocks.steps) == steps


def test_a_prefix_is_before_every_token_that_is_generated(llama: Path) -> None:
    """Against forward passes: peft 0.21 loses a prefix when transformers 5.24 generates."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ours, theirs = adapted(distributed(llama), config), adapted(local(llama), config)
    ids = batch()["input_ids"][:1, :30]
    found = ours.generate(input_ids=ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    for _ in range(5):
        logits = theirs(ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        logits[:, 2] = -torch.inf  # what min_new_tokens does to the last token of a text
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(found, ids)


def test_deep_prompts_are_applied_to_every_token_that_is_generated(llama: Path) -> None:
    ours = distributed(llama, deep_prompts=3)
    prompt = batch()["input_ids"][:1, :12]
    found = [ours.generate(input_ids=prompt, max_new_tokens=4, use_cache=each) for each in (True, False)]
    assert torch.equal(*found)
