"""What a model consists of, held against its revision."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL, resolve_model
from p2pinfer.models.pieces.manifest import (
    Manifest,
    SmallFile,
    SwarmName,
    WeightFile,
    parse_swarm_name,
    small_files,
)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    source = resolve_model(BUNDLED_MODEL, cache_dir=tmp_path_factory.mktemp("cache"))
    manifest = source.holdings().manifest
    assert manifest.revision == source.spec.revision
    return manifest


def test_a_name_by_content_is_a_revision_and_perhaps_an_address_of_words() -> None:
    revision, words = "0123456789abcdef" * 2, "f" * 32
    assert parse_swarm_name(f"swarm:{revision}") == SwarmName(revision)
    both = parse_swarm_name(f"swarm:{revision}-{words}")
    assert both == SwarmName(revision, words) and str(both) == f"swarm:{revision}-{words}"
    for other in (
        "",
        "swarm:",
        f"swarm:{revision[1:]}",
        f"swarm:{revision.upper()}",
        f"{revision}",
        f"swarm:{revision}-",
    ):
        assert parse_swarm_name(other) is None


def test_every_part_of_a_manifest_is_part_of_its_addresses(bundled: Manifest) -> None:
    bundled.check()
    first, *rest = bundled.weights
    for other in (
        replace(bundled, numbers="{}"),
        replace(bundled, weights=tuple(rest)),
        replace(bundled, weights=(replace(first, sha256="0" * 64), *rest)),
        replace(bundled, weights=(replace(first, name="other.safetensors"), *rest)),
    ):
        assert other.revision != bundled.revision
    altered = tuple(replace(each, digest="0" * 64) for each in bundled.texts if each.name == "tokenizer.json")
    assert altered and replace(bundled, texts=altered).words != bundled.words
    assert replace(bundled, texts=()).words == ""
    # Neither the name for people nor a size that somebody claims is what a revision stands for.
    assert replace(bundled, model="x", weights=(replace(first, size=1), *rest)).revision == bundled.revision


@pytest.mark.parametrize(
    "weights",
    [
        (),
        (WeightFile("../model.safetensors", 1, "0" * 64),),
        (WeightFile("a/b.safetensors", 1, "0" * 64),),
        (WeightFile("model.bin", 1, "0" * 64),),
        (WeightFile("model.safetensors", 0, "0" * 64),),
        (WeightFile("model.safetensors", 1 << 50, "0" * 64),),
        (WeightFile("a.safetensors", 1, "0" * 64), WeightFile("a.safetensors", 1, "1" * 64)),
        (WeightFile("a.safetensors", 1, "0" * 64), WeightFile("b.gguf", 1, "1" * 64)),
    ],
)
def test_names_and_sizes_of_no_model_are_refused(weights: tuple[WeightFile, ...]) -> None:
    with pytest.raises(CheckpointError):
        Manifest("m", "{}", weights, ()).check()


@pytest.mark.parametrize(
    "texts",
    [
        (SmallFile("../config.json", 1, "0" * 64),),
        (SmallFile("modeling.py", 1, "0" * 64),),
        (SmallFile("config.json", 1 << 40, "0" * 64),),
        (SmallFile("config.json", 1, "0" * 64), SmallFile("config.json", 1, "1" * 64)),
    ],
)
def test_small_files_of_no_model_are_refused(texts: tuple[SmallFile, ...]) -> None:
    with pytest.raises(CheckpointError):
        Manifest("m", "{}", (WeightFile("a.safetensors", 1, "0" * 64),), texts).check()


def test_only_the_config_of_the_revision_is_taken(bundled: Manifest, tmp_path: Path) -> None:
    source = resolve_model(BUNDLED_MODEL, cache_dir=tmp_path)
    content = (source.holdings().folder / "config.json").read_bytes()
    config = bundled.check_config(content)
    assert config["model_type"] == "llama"
    # What changes no token may differ, and what does may not.
    bundled.check_config(json.dumps({**config, "max_position_embeddings": 17}).encode())
    for other in (
        json.dumps({**config, "rms_norm_eps": 1e-3}).encode(),
        json.dumps({**config, "model_type": "qwen3_5"}).encode(),
        b"[]",
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
    ):
        with pytest.raises(CheckpointError):
            bundled.check_config(other)


def test_small_files_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").mkdir()
    assert [each.name for each in small_files(tmp_path)] == ["config.json"]
