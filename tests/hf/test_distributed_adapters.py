"""Adapters of a model on the swarm: saved, loaded, switched off and sent on when they change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from p2pinfer.errors import LocalError

from .one_machine import ALL_LINEAR, adapted, batch, local, peft, trained
from .support import distributed

# The libraries warn of what they do to each other.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"exclude_modules": ["o_proj"], "layers_to_transform": [1, 3]},
    ],
)
def test_what_peft_saves_runs_on_one_machine_and_what_it_saved_there_runs_here(
    llama: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    config = peft.LoraConfig(r=4, target_modules=ALL_LINEAR, init_lora_weights=False, **options)
    ours = adapted(distributed(llama), config)
    with torch.no_grad():  # also those that are no LoRA, if there are any
        for each in trained(ours):
            each.add_(0.01)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(local(llama), tmp_path)
    again = peft.PeftModel.from_pretrained(distributed(llama), tmp_path)
    kept = batch()["attention_mask"].bool()
    with torch.no_grad():
        logits = [model(**batch()).logits[kept] for model in (ours, theirs, again)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
    assert torch.equal(logits[0], logits[2])


def test_an_adapter_is_switched_off_and_on(llama: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    ours = adapted(distributed(llama), config)
    plain = distributed(llama)
    with torch.no_grad():
        assert not torch.equal(ours(**batch()).logits, plain(**batch()).logits)
        with ours.disable_adapter():
            assert torch.equal(ours(**batch()).logits, plain(**batch()).logits)


def test_what_is_trained_without_peft_is_kept_in_a_file(llama: Path, tmp_path: Path) -> None:
    one, other = distributed(llama, deep_prompts=2), distributed(llama, deep_prompts=2)
    for model in (one, other):
        for each in (model.model, model.lm_head):
            each.requires_grad_(False)
        model.model.layers.deep_prompts.requires_grad_(True)
    one.save_pretrained(tmp_path)
    other.load_trained(tmp_path)
    assert torch.equal(one.model.layers.deep_prompts, other.model.layers.deep_prompts)
    with pytest.raises(LocalError, match="which this model has not"):
        distributed(llama).load_trained(tmp_path)


def test_an_adapters_values_are_taken_anew_when_they_change_and_not_before(llama: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ours = adapted(distributed(llama), config)
    blocks = ours.base_model.model.model.layers.passes.trainer
    with torch.no_grad():
        ours(**batch())
        ours(**batch())
        train_in_place(ours)
        ours(**batch())
    assert blocks.adapters[0] is blocks.adapters[1]
    assert blocks.adapters[1] is not blocks.adapters[2]


def train_in_place(model: Any) -> None:
    """Change the parameters as a fused optimiser does: without a trace in their versions."""
    for each in trained(model):
        version = each._version
        each.data.add_(0.01)
        assert each._version == version
