from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint.checkpoint import open_checkpoint
from p2pinfer.models.compute.blocks import load_blocks
from p2pinfer.models.compute.target import Target
from p2pinfer.models.numerics import FLOAT32
from p2pinfer.models.span import BlockSpan

TARGET = Target(torch.device("cpu"), FLOAT32)


class Bar:
    """A `Progress` that remembers."""

    def __init__(self) -> None:
        self.label = ""
        self.total = self.seen = self.ended = 0

    def start(self, label: str, total_bytes: int) -> None:
        self.label, self.total = label, total_bytes

    def advance(self, n: int) -> None:
        self.seen += n

    def done(self) -> None:
        self.ended += 1


@pytest.fixture
def folder(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> Path:
    return write_checkpoint(tmp_path, "qwen3")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a checkpoint."""
    files: Any = safetensors.torch
    path = folder / "model.safetensors"
    tensors: dict[str, Tensor] = files.load_file(path)
    change(tensors)
    files.save_file(tensors, path, metadata={"format": "pt"})


def load(folder: Path, span: BlockSpan, bar: Bar | None = None) -> None:
    load_blocks(open_checkpoint(folder, "mine"), span, TARGET, progress=bar)


def test_loading_reads_the_span_and_says_how_far_it_is(folder: Path) -> None:
    bar = Bar()
    load(folder, BlockSpan(1, 3), bar)
    checkpoint = open_checkpoint(folder, "mine")
    held = checkpoint.bytes_of(checkpoint.block_names(1) | checkpoint.block_names(2))
    assert (bar.label, bar.total, bar.seen, bar.ended) == ("loading blocks 1:3", held, held, 1)


def test_frequencies_that_an_old_checkpoint_stores_are_not_needed(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(8)}))
    load(folder, BlockSpan(0, 1))


def test_a_tensor_without_a_use_is_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.2.mlp.extra.weight": torch.ones(8)}))
    load(folder, BlockSpan(0, 2))
    bar = Bar()
    with pytest.raises(
        CheckpointError, match=r"mine has the tensor model\.layers\.2\.mlp\.extra\.weight, which"
    ):
        load(folder, BlockSpan(2, 3), bar)
    assert bar.ended == 1


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.1\.mlp\.down_proj\.weight"):
        load(folder, BlockSpan(1, 2))


def test_a_misshapen_tensor_is_refused(folder: Path) -> None:
    name = "model.layers.3.self_attn.q_norm.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(17)}))
    with pytest.raises(
        CheckpointError, match=r"q_norm\.weight of mine has the shape \(17,\); .* implies \(16,\)"
    ):
        load(folder, BlockSpan(3, 4))


def queries_bias(tensors: dict[str, Tensor]) -> None:
    for name, size in (("q", 64), ("k", 32), ("v", 32)):
        tensors[f"model.layers.0.self_attn.{name}_proj.bias"] = torch.ones(size)


def output_bias(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.ones(48)


def mlp_bias(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.down_proj.bias"] = torch.ones(48)


@pytest.mark.parametrize(
    ("family", "options", "add"),
    [
        ("llama", {"attention_bias": False}, queries_bias),
        ("mistral", {"head_dim": 16}, queries_bias),
        ("qwen2", {}, output_bias),
        ("gemma2", {"attention_bias": False}, output_bias),
        ("llama", {"mlp_bias": False}, mlp_bias),
        ("qwen3", {}, mlp_bias),
    ],
)
def test_a_bias_that_the_config_does_not_announce_is_refused(
    family: str,
    options: dict[str, Any],
    add: Callable[[dict[str, Tensor]], None],
    tmp_path: Path,
    write_checkpoint: Callable[..., Path],
) -> None:
    """transformers leaves it out, which gives another text than the model was trained for."""
    folder = write_checkpoint(tmp_path, family, **options)
    load(folder, BlockSpan(0, 1))
    rewrite(folder, add)
    with pytest.raises(
        CheckpointError, match=r"has the tensor model\.layers\.0\.\S+\.bias, which a model of family"
    ):
        load(folder, BlockSpan(0, 1))


def test_biases_that_are_announced_may_all_be_left_out_and_not_some(folder: Path) -> None:
    def drop(*names: str) -> None:
        rewrite(
            folder, lambda tensors: [tensors.pop(f"model.layers.1.self_attn.{name}.bias") for name in names]
        )

    drop("q_proj")
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.1\.self_attn\.q_proj\.bias"):
        load(folder, BlockSpan(1, 2))
    drop("k_proj", "v_proj")
    load(folder, BlockSpan(1, 2))


def test_what_is_loaded_does_not_hang_on_to_the_file(folder: Path) -> None:
    """The mapping of a shard counts as the process's memory for as long as any view of it is alive."""
    checkpoint = open_checkpoint(folder, "mine")
    blocks = load_blocks(checkpoint, BlockSpan(0, 4), TARGET)
    del checkpoint
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert blocks.span == BlockSpan(0, 4)
