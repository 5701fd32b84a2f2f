from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint.checkpoint import INDEX, block_of, open_checkpoint
from p2pinfer.models.numerics import FLOAT32

safetensors_torch: Any = safetensors.torch  # its stubs are partly unknown

SIZES: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 16,
    "vocab_size": 16,
    "max_position_embeddings": 32,
}


@pytest.fixture
def copy(tiny_stories: Path, tmp_path: Path) -> Path:
    """A copy of the bundled model, to be damaged."""
    return Path(shutil.copytree(tiny_stories, tmp_path / "copy"))


def small_folder(folder: Path, *, dtype: torch.dtype = torch.float16, **config: Any) -> Path:
    """A model folder of one shard with a single tensor in each of two blocks."""
    folder.mkdir()
    tensors = {f"model.layers.{i}.weight": torch.full((2, 3), i, dtype=dtype) for i in range(2)}
    safetensors_torch.save_file(
        {**tensors, "model.norm.weight": torch.ones(8, dtype=dtype)}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({**SIZES, **config}))
    return folder


def test_every_tensor_is_the_one_that_is_stored(tiny_stories: Path) -> None:
    checkpoint = open_checkpoint(tiny_stories, "tiny-stories")
    stored = {
        k: v
        for path in tiny_stories.glob("*.safetensors")
        for k, v in safetensors_torch.load_file(path).items()
    }
    assert checkpoint.names() == stored.keys()
    for name, tensor in stored.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
    assert checkpoint.bytes_of(stored) == sum(t.numel() * t.element_size() for t in stored.values())


def test_blocks_are_told_apart_by_their_number(tiny_stories: Path) -> None:
    checkpoint = open_checkpoint(tiny_stories, "tiny-stories")
    assert all(len(checkpoint.block_names(i)) == 9 for i in range(8))
    assert checkpoint.block_names(8) == frozenset()
    assert {n for n in checkpoint.names() if block_of(n) is None} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
    }
    assert block_of("model.layers.10.weight") == 10


def test_the_spec_is_read_from_the_config(tiny_stories: Path) -> None:
    spec = open_checkpoint(tiny_stories, "tiny-stories").spec
    assert (spec.model, spec.family, spec.dtype) == ("tiny-stories", "llama", "bfloat16")
    assert (spec.num_blocks, spec.hidden_size, spec.vocab_size, spec.max_positions) == (8, 320, 4096, 1024)
    assert spec.kv_bytes_per_token_per_block() == 2 * 4 * 40 * 2
    assert spec.kv_bytes_per_token_per_block(FLOAT32) == 2 * 4 * 40 * 4


def test_the_config_is_complete(tiny_stories: Path) -> None:
    config = open_checkpoint(tiny_stories, "tiny-stories").config
    assert config["num_hidden_layers"] == 8
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0}


def test_a_single_shard_needs_no_index(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_folder(tmp_path / "m"), "m")
    assert checkpoint.spec.dtype == "float16"  # the config names none
    assert torch.equal(checkpoint.read("model.layers.1.weight"), torch.ones(2, 3, dtype=torch.float16))


def test_opening_and_hashing_imports_no_torch(tiny_stories: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from p2pinfer.models.checkpoint.checkpoint import open_checkpoint\n"
        "open_checkpoint(Path(sys.argv[1]), 'm'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, tiny_stories], check=False).returncode == 0


def test_a_missing_tensor_is_named(tiny_stories: Path) -> None:
    checkpoint = open_checkpoint(tiny_stories, "tiny-stories")
    with pytest.raises(CheckpointError, match=r"tiny-stories lacks the tensor lm_head\.weight"):
        checkpoint.read("lm_head.weight")


def test_a_shard_cut_short_is_refused(copy: Path) -> None:
    shard = copy / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors is damaged or cut short"):
        open_checkpoint(copy, "m")


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]"])
def test_a_shard_with_a_bad_header_is_refused(copy: Path, content: bytes) -> None:
    (copy / "model-00001-of-00003.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        open_checkpoint(copy, "m")


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.safetensors is missing"):
        open_checkpoint(copy, "m")


def test_a_tensor_that_the_index_promises_must_be_in_its_shard(copy: Path) -> None:
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["model.layers.0.extra"] = "model-00001-of-00003.safetensors"
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.0\.extra"):
        open_checkpoint(copy, "m")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "weights.bin", 7, ""])
def test_an_index_cannot_point_out_of_its_folder(copy: Path, shard: object) -> None:
    (copy / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(CheckpointError, match="not a safetensors file of the same folder"):
        open_checkpoint(copy, "m")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {}}', "{}", "\0", "[" * 100_000]
)
def test_a_damaged_index_is_refused(copy: Path, text: str) -> None:
    (copy / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="fetch it again"):
        open_checkpoint(copy, "m")


@pytest.mark.parametrize("text", ["{", "[]", "", "\xff"])
def test_a_damaged_config_is_refused(copy: Path, text: str) -> None:
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json .*fetch it again"):
        open_checkpoint(copy, "m")


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(tmp_path, "m")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        open_checkpoint(folder, "m")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights: neither"):
        open_checkpoint(folder, "m")


def test_a_block_without_tensors_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensors of block 2"):
        open_checkpoint(small_folder(tmp_path / "m", num_hidden_layers=3), "m")


def test_a_stored_dtype_that_no_computation_takes_is_refused(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "m", dtype=torch.float8_e4m3fn)
    checkpoint = open_checkpoint(folder, "m")
    with pytest.raises(CheckpointError, match=r"stores model\.norm\.weight as torch\.float8_e4m3fn"):
        checkpoint.read("model.norm.weight")
