"""What is read is what was hashed, whatever happens to the folder meanwhile."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from p2pinfer.errors import CheckpointError, ModelChanged
from p2pinfer.models.checkpoint.checkpoint import INDEX, Checkpoint, open_checkpoint
from p2pinfer.models.checkpoint.source import resolve_model
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.pieces.shard_header import open_header, read_header
from p2pinfer.models.span import BlockSpan

safetensors_torch: Any = safetensors.torch  # its stubs are partly unknown
load_file, save_file = safetensors_torch.load_file, safetensors_torch.save_file

CHANGED = "model.layers.3.mlp.down_proj.weight"
SAME = "model.layers.3.self_attn.q_proj.weight"
CONFIG = ComputeConfig(device="cpu", dtype="float32", cache_bytes=1 << 20)


@pytest.fixture
def folder(tiny_stories: Path, tmp_path: Path) -> Path:
    """The bundled model in one shard, to be changed."""
    folder = Path(shutil.copytree(tiny_stories, tmp_path / "model"))
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= {name: tensor.clone() for name, tensor in load_file(path).items()}
        path.unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shard_of(folder: Path) -> Path:
    return folder / "model.safetensors"


def write_changed(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Save the folder's shard anew with one tensor changed, as a training run does."""
    path = shard_of(folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file({**tensors, CHANGED: change(tensors[CHANGED])}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def write_in_place(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Overwrite the bytes of one tensor, as rsync --inplace does."""
    path = shard_of(folder)
    stored, tensor = open_header(path)[CHANGED], load_file(path)[CHANGED].clone()
    with path.open("r+b") as file:
        file.seek(stored.start)
        file.write(change(tensor).view(torch.uint8).numpy().tobytes())


def cut_short(folder: Path, change: object) -> None:
    os.truncate(shard_of(folder), open_header(shard_of(folder))[CHANGED].start + 7)


def remove(folder: Path, change: object) -> None:
    shard_of(folder).unlink()


def larger(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 1.5


CHANGES: list[Callable[[Path, Callable[[torch.Tensor], torch.Tensor]], None]] = [
    write_changed,
    write_in_place,
    cut_short,
    remove,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_that_is_not_what_was_hashed_is_not_used(
    folder: Path, tmp_path: Path, change: Callable[[Path, Any], None]
) -> None:
    checkpoint = open_checkpoint(folder, "m", cache_dir=tmp_path / "cache")
    before = checkpoint.read(SAME), checkpoint.read(CHANGED)
    change(folder, larger)
    with pytest.raises(ModelChanged, match=rf"model\.safetensors changed after it was hashed: {CHANGED} "):
        checkpoint.read(CHANGED)
    assert torch.equal(before[1], load_ours(checkpoint, before[1])), "what was read has changed"


def load_ours(checkpoint: Checkpoint, read: torch.Tensor) -> torch.Tensor:
    """A copy of what was read, by a way that would touch a mapped file's pages."""
    return torch.tensor(read.tolist(), dtype=read.dtype)


def test_what_did_not_change_can_still_be_read(folder: Path) -> None:
    checkpoint = open_checkpoint(folder, "m")
    before = checkpoint.read(SAME)
    write_in_place(folder, larger)
    assert torch.equal(checkpoint.read(SAME), before)


RESHAPES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda tensor: tensor.reshape(tensor.shape[::-1]),
    lambda tensor: tensor.view(torch.float16),
    lambda tensor: tensor.view(torch.int16),
]


@pytest.mark.parametrize("reshape", RESHAPES)
def test_the_same_bytes_under_another_shape_or_dtype_are_another_tensor(
    folder: Path, tmp_path: Path, reshape: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    forge_stamp(folder, tmp_path / "cache", lambda: write_changed(folder, reshape))
    checkpoint = open_checkpoint(folder, "m", cache_dir=tmp_path / "cache")
    with pytest.raises(ModelChanged):
        checkpoint.read(CHANGED)


def forge_stamp(folder: Path, cache_dir: Path, change: Callable[[], None]) -> str:
    """Change the folder so that nothing of the file's metadata shows it; returns the revision before."""
    revision = open_checkpoint(folder, "m", cache_dir=cache_dir).spec.revision
    [note] = cache_dir.glob("sha256/*.json")
    remembered = json.loads(note.read_text())
    change()
    note.unlink()
    open_checkpoint(folder, "m", cache_dir=cache_dir)
    now = json.loads(note.read_text())
    note.write_text(json.dumps({**now, "sha256": remembered["sha256"], "tensors": remembered["tensors"]}))
    return revision


def test_a_change_that_no_metadata_shows_is_noticed_before_it_is_computed_with(
    folder: Path, tmp_path: Path
) -> None:
    """An image layer can give a file the size, the times and the inode of the one before."""
    cache_dir = tmp_path / "cache"
    before = forge_stamp(folder, cache_dir, lambda: write_changed(folder, larger))
    source = resolve_model(str(folder), cache_dir=cache_dir)
    assert source.spec.revision == before, "this test forges nothing"
    open_runner(
        source.fetch(BlockSpan(0, 3), embedding_and_head=False), BlockSpan(0, 3), CONFIG
    )  # these are as they were
    with pytest.raises(ModelChanged):
        open_runner(source.fetch(BlockSpan(2, 5), embedding_and_head=False), BlockSpan(2, 5), CONFIG)
    assert resolve_model(str(folder), cache_dir=cache_dir).spec.revision != before  # the next start knows


def test_a_node_that_moves_to_other_blocks_loads_what_it_announced_or_nothing(
    folder: Path, tmp_path: Path
) -> None:
    source = resolve_model(str(folder), cache_dir=tmp_path / "cache")
    open_runner(source.fetch(BlockSpan(2, 5), embedding_and_head=False), BlockSpan(2, 5), CONFIG)
    write_changed(folder, larger)
    with pytest.raises(ModelChanged, match="start p2pinfer again"):
        open_runner(source.fetch(BlockSpan(1, 4), embedding_and_head=False), BlockSpan(1, 4), CONFIG)


def test_the_ends_are_held_to_it_too(folder: Path, tmp_path: Path) -> None:
    source = resolve_model(str(folder), cache_dir=tmp_path / "cache")
    path = shard_of(folder)
    stored = open_header(path)["model.embed_tokens.weight"]
    with path.open("r+b") as file:
        file.seek(stored.start + stored.nbytes // 2)
        file.write(b"\0\1\2\3")
    with pytest.raises(ModelChanged, match=r"model\.embed_tokens\.weight is not used"):
        load_embedding_and_head(source.fetch(None, embedding_and_head=True), CONFIG)


def test_a_config_or_index_that_is_replaced_changes_nothing_that_was_opened(
    tiny_stories: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_stories, tmp_path / "model"))
    source = resolve_model(str(folder), cache_dir=tmp_path / "cache")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    (folder / INDEX).write_text("{}")
    checkpoint = source.fetch(BlockSpan(0, 8), embedding_and_head=True)
    assert checkpoint.config["rope_parameters"]["rope_theta"] == 10_000
    assert load_embedding_and_head(checkpoint, CONFIG).spec.revision == source.spec.revision


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"a": 7}',
        b'{"a": {}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b"[" * 100_000,
    ],
)
def test_a_header_that_makes_no_sense_is_refused_in_a_line(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with path.open("rb") as file, pytest.raises(ValueError):
        read_header(file)
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        open_header(path)
