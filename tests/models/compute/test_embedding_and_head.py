from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.config import ComputeConfig

from ..bounds import bound_of_product


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ends_are_those_of_transformers(
    family_checkpoint: Checkpoint, oracle: Callable[..., PreTrainedModel], dtype: str
) -> None:
    """Embedding scales, offset norms, tied heads and soft caps included."""
    ends = load_embedding_and_head(family_checkpoint, ComputeConfig(device="cpu", dtype=dtype))
    model: Any = oracle(family_checkpoint.folder, getattr(torch, dtype))
    ids = [3, 77, 198]
    embedded = ends.embed(ids)
    assert embedded.dtype == ends.dtype
    with torch.inference_mode():
        torch.testing.assert_close(embedded, model.model.embed_tokens(torch.tensor(ids)))
        normed = model.model.norm(embedded)
        expected = model.lm_head(normed).float()
        bound = bound_of_product(normed, model.lm_head.weight)
        if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
            expected = (expected / cap).tanh() * cap
    logits = ends.logits(embedded.float())
    assert logits.dtype == torch.float32
    # Two products, of rows that were normed and rounded in two ways. A soft cap only brings numbers nearer.
    assert ((logits - expected).abs() <= 4 * bound).all()


FILES: Any = safetensors.torch  # whose types are partly unknown
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def other_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(1))


def equal_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def head_alone(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def biased_head(tensors: dict[str, Tensor]) -> None:
    other_head(tensors)
    tensors["lm_head.bias"] = torch.arange(float(len(tensors[HEAD])))


@pytest.mark.parametrize("tied", [True, False, None])
@pytest.mark.parametrize("change", [None, other_head, equal_head, head_alone, biased_head])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "mixtral"])
def test_the_files_own_head_counts_whatever_the_config_says_of_it(
    family: str,
    change: Callable[[dict[str, Tensor]], None] | None,
    tied: bool | None,
    tmp_path: Path,
    write_checkpoint: Callable[..., Path],
) -> None:
    folder = write_checkpoint(tmp_path, family, tie_word_embeddings=True, num_hidden_layers=1)
    say_tied(folder, tied)
    tensors: dict[str, Tensor] = FILES.load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
    FILES.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tied or (tied is None and family == "gemma2") or {HEAD, EMBEDDING} <= tensors.keys():
        check_ends(folder)
        return
    with pytest.raises(CheckpointError, match="lacks the tensor"):  # transformers would make it up
        load_embedding_and_head(open_checkpoint(folder, "m"), ComputeConfig(device="cpu", dtype="float32"))


@pytest.mark.parametrize(
    ("change", "tied", "warned"),
    [(other_head, True, True), (other_head, False, False), (equal_head, True, False), (None, True, False)],
)
def test_a_head_that_is_not_tied_as_the_config_says_is_told(
    change: Callable[[dict[str, Tensor]], None] | None,
    tied: bool,
    warned: bool,
    tmp_path: Path,
    write_checkpoint: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = write_checkpoint(tmp_path, "llama", tie_word_embeddings=True, num_hidden_layers=1)
    say_tied(folder, tied)
    tensors: dict[str, Tensor] = FILES.load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
    FILES.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load_embedding_and_head(open_checkpoint(folder, "mine"), ComputeConfig(device="cpu", dtype="float32"))
    said = [record.message for record in caplog.records if "a separate head" in record.message]
    assert len(said) == warned
    assert all(message.startswith("the config of mine ties the head") for message in said)


def test_a_head_in_a_shard_of_its_own_is_found(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> None:
    folder = write_checkpoint(tmp_path, "llama", tie_word_embeddings=True, num_hidden_layers=1)
    tensors: dict[str, Tensor] = FILES.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    other_head(tensors)
    FILES.save_file({HEAD: tensors.pop(HEAD)}, folder / "head.safetensors", metadata={"format": "pt"})
    FILES.save_file(tensors, folder / "rest.safetensors", metadata={"format": "pt"})
    places = {**dict.fromkeys(tensors, "rest.safetensors"), HEAD: "head.safetensors"}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_ends(folder)


def say_tied(folder: Path, tied: bool | None) -> None:
    """What the config says of the head; None: nothing."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings")
    said = {} if tied is None else {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps({**config, **said}))


def check_ends(folder: Path) -> None:
    """The ends are those of transformers, loaded from the same files."""
    auto: Any = AutoModelForCausalLM
    model: Any = auto.from_pretrained(folder, dtype=torch.float32)
    ends = load_embedding_and_head(open_checkpoint(folder, "m"), ComputeConfig(device="cpu", dtype="float32"))
    hidden = ends.embed([3, 77, 198])
    with torch.inference_mode():
        torch.testing.assert_close(
            hidden, model.model(torch.tensor([[3, 77, 198]]), output_hidden_states=True).hidden_states[0][0]
        )
        logits = model.lm_head(model.model.norm(hidden))
        if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
            logits = (logits / cap).tanh() * cap
    torch.testing.assert_close(ends.logits(hidden), logits, atol=1e-3, rtol=1e-4)


def test_a_head_that_is_missing_is_named(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> None:
    folder = write_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight"):
        load_embedding_and_head(open_checkpoint(folder, "mine"), ComputeConfig())
