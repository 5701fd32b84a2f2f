"""What a model on the swarm cannot do, which it refuses with a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from p2pinfer.errors import LocalError

from .conftest import WriteCheckpoint
from .one_machine import adapted, batch, library, local, peft
from .support import distributed

# The libraries warn of what they do to each other.
pytestmark = pytest.mark.filterwarnings("default")


def test_labels_behind_padding_are_refused_with_a_sentence(llama: Path) -> None:
    asked = batch()
    asked["labels"] = asked["input_ids"]
    with pytest.raises(LocalError, match="set them to -100"):
        distributed(llama)(**asked)


def test_other_masks_are_refused_with_a_sentence(llama: Path) -> None:
    with pytest.raises(LocalError, match=r"on the swarm it is \(batch, seq\)"):
        distributed(llama)(input_ids=batch()["input_ids"], attention_mask=torch.ones(3, 1, 55, 55))


def test_other_adapters_than_lora_are_refused_with_a_sentence(llama: Path) -> None:
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(LocalError, match="products take LoRA"):
        adapted(distributed(llama), config)(**batch())


def test_biases_of_an_adapter_are_refused_with_a_sentence(llama: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(LocalError, match="set lora_bias to False"):
        adapted(distributed(llama), config)(**batch())


def test_scores_of_routers_are_refused_with_a_sentence(
    tmp_path: Path, write_checkpoint: WriteCheckpoint
) -> None:
    with pytest.raises(LocalError, match="the scores of routers stay on the swarm"):
        distributed(write_checkpoint(tmp_path, "mixtral"))(**batch(), output_router_logits=True)


def test_a_cache_that_is_no_prefix_of_all_rows_is_refused_with_a_sentence(llama: Path) -> None:
    ours, theirs = distributed(llama), local(llama)
    cache = theirs(batch()["input_ids"][:, :4]).past_key_values
    with pytest.raises(LocalError, match="differ from row to row"):
        ours(input_ids=batch()["input_ids"], past_key_values=cache)
    with pytest.raises(LocalError, match="past_key_values is a tuple"):
        ours(input_ids=batch()["input_ids"], past_key_values=((torch.zeros(3, 2, 4, 16),) * 2,))
    short = library.DynamicCache()
    short.update(torch.zeros(3, 2, 4, 16), torch.zeros(3, 2, 4, 16), 0)
    with pytest.raises(LocalError, match="a prefix of 1 blocks"):
        ours(input_ids=batch()["input_ids"], past_key_values=short)


def test_a_mask_that_hides_a_part_of_a_prefix_is_refused_with_a_sentence(llama: Path) -> None:
    ours, theirs, ids = distributed(llama), local(llama), batch()["input_ids"][:1]
    cache = theirs(ids[:, :4]).past_key_values
    mask = torch.ones(1, 59)
    mask[0, 2] = 0
    with pytest.raises(LocalError, match="hides a part of the prefix"):
        ours(input_ids=ids, attention_mask=mask, past_key_values=cache)


def test_a_layer_alone_says_how_it_is_called(llama: Path) -> None:
    ours = distributed(llama)
    with pytest.raises(LocalError, match=r"layers\[i : i \+ 1\]"):
        ours.model.layers[0](torch.zeros(1, 1, 48))
    with pytest.raises(LocalError, match="runs on the swarm"):
        ours.model.layers[0].self_attn.q_proj(torch.zeros(1, 48))
    with pytest.raises(LocalError, match="at least one"):
        ours.model.layers[3:1]
