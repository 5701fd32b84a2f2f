from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint.checkpoint import INDEX, open_checkpoint
from p2pinfer.models.span import BlockSpan

from ..hub_server import HubServer
from .hub_client import CONFIG, MODEL, SHARDS, find, little_model


def test_the_model_is_known_before_a_weight_is_here(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    spec = find(hub, cache).spec
    assert hub.fetched() == ["config.json", INDEX]
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert open_checkpoint(tmp_path, MODEL).spec == spec


def test_only_the_shards_of_the_span_are_fetched(hub: HubServer, cache: Path) -> None:
    source = find(hub, cache)
    hub.fetched()
    checkpoint = source.fetch(BlockSpan(1, 2), embedding_and_head=False)
    assert hub.fetched() == ["model-1.safetensors"]
    assert checkpoint.names() == {"model.layers.1.weight"}
    assert float(checkpoint.read("model.layers.1.weight")[7]) == 1.0
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.0"):
        checkpoint.read("model.layers.0.weight")


def test_what_would_have_to_be_fetched_is_known_before(hub: HubServer, cache: Path) -> None:
    source = find(hub, cache)
    size = {name: len(content) for name, content in little_model().items()}
    first, second = BlockSpan(0, 1), BlockSpan(0, 2)
    assert source.missing_bytes(second, embedding_and_head=False) == size[SHARDS[0]] + size[SHARDS[1]]
    assert source.missing_bytes(first, embedding_and_head=True) == size[SHARDS[0]] + size[SHARDS[2]]
    source.fetch(first, embedding_and_head=False)
    assert source.missing_bytes(first, embedding_and_head=False) == 0
    assert source.missing_bytes(second, embedding_and_head=False) == size[SHARDS[1]]


def test_the_ends_come_with_the_tokenizer(hub: HubServer, cache: Path) -> None:
    source = find(hub, cache)
    hub.fetched()
    checkpoint = source.fetch(None, embedding_and_head=True)
    assert hub.fetched() == ["model-2.safetensors", "tokenizer.json"]
    assert "model.norm.weight" in checkpoint.names()
    assert (checkpoint.folder / "tokenizer.json").is_file()


def test_everything_that_is_said_about_tokens_comes_along(hub: HubServer, cache: Path) -> None:
    beside = [
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer_config.json",
        "generation_config.json",
    ]
    hub.files |= dict.fromkeys(beside, b"{}") | {"chat_template.jinja": b"{{ messages }}"}
    source = find(hub, cache)
    hub.fetched()
    checkpoint = source.fetch(None, embedding_and_head=True)
    expected = sorted([*beside, "chat_template.jinja", "tokenizer.json", "model-2.safetensors"])
    assert hub.fetched() == expected
    assert all((checkpoint.folder / name).is_file() for name in expected)


def test_what_is_here_is_not_fetched_again(hub: HubServer, cache: Path) -> None:
    find(hub, cache).fetch(BlockSpan(0, 2), embedding_and_head=False)
    hub.fetched()
    find(hub, cache).fetch(BlockSpan(0, 3), embedding_and_head=False)
    assert hub.fetched() == ["model-2.safetensors"]


def test_another_model_card_fetches_nothing_again(hub: HubServer, cache: Path) -> None:
    revision = find(hub, cache).spec.revision
    find(hub, cache).fetch(BlockSpan(0, 3), embedding_and_head=False)
    hub.fetched()
    hub.commit, hub.files["README.md"] = "f" * 40, b"a better card"
    source = find(hub, cache)
    source.fetch(BlockSpan(0, 3), embedding_and_head=False)
    assert (hub.fetched(), source.spec.revision) == ([], revision)


def test_a_config_that_computes_something_else_is_another_model(hub: HubServer, cache: Path) -> None:
    revision = find(hub, cache).spec.revision
    hub.fetched()
    hub.files["config.json"] = json.dumps({**CONFIG, "max_position_embeddings": 64}).encode()
    spec = find(hub, cache).spec
    assert (hub.fetched(), spec.max_positions, spec.revision) == (["config.json"], 64, revision)
    hub.files["config.json"] = json.dumps({**CONFIG, "rope_theta": 500_000}).encode()
    spec = find(hub, cache).spec
    assert (hub.fetched(), spec.revision == revision) == (["config.json"], False)


def test_a_single_file_is_fetched_whole(hub: HubServer, cache: Path) -> None:
    save: Any = safetensors.torch.save
    tensors = {f"model.layers.{i}.weight": torch.full((4,), float(i)) for i in range(3)}
    hub.files = {"config.json": hub.files["config.json"], "model.safetensors": save(tensors)}
    checkpoint = find(hub, cache).fetch(BlockSpan(2, 3), embedding_and_head=False)
    assert hub.fetched() == ["config.json", "model.safetensors"]
    assert checkpoint.names() == tensors.keys()


def test_the_stored_dtype_is_the_commonest_one_the_hub_lists(hub: HubServer, cache: Path) -> None:
    hub.extra = {"safetensors": {"parameters": {"F32": 8, "BF16": 300_000}, "total": 300_008}}
    assert find(hub, cache).spec.dtype == "bfloat16"
