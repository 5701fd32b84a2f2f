"""GGUF files give the numbers of the package `gguf`, the tokens of the same weights, and no surprises."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import torch as files
from torch import Tensor

from p2pinfer.errors import CheckpointError, ModelChanged
from p2pinfer.models.checkpoint import gguf_quants
from p2pinfer.models.checkpoint.gguf_file import open_gguf_header
from p2pinfer.models.checkpoint.gguf_model import open_gguf
from p2pinfer.models.checkpoint.source import resolve_model
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import Chunk, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.text import load_tokenizer
from p2pinfer.models.verify.reference import open_reference
from p2pinfer.models.verify.verify import measure_span
from p2pinfer.planning.described_model import describe_model

from ..families.parity import draw_weights
from .gguf_writer import parts_of, random_blocks, write_gguf

library: Any = gguf
SPAN = BlockSpan(0, 2)
CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
MIXED = {"gate_proj": "Q4_K", "up_proj": "Q5_K", "down_proj": "Q6_K", "q_proj": "Q8_0", "v_proj": "F16"}


def make_folder(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A folder as transformers saves it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model: Any = auto.from_config(AutoConfig.for_model(family, **{**CONFIG, **changes}), dtype=torch.float32)
    draw_weights(model)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": family, **CONFIG, **changes}))
    return folder


def save(folder: Path, weights: dict[str, Tensor]) -> None:
    writer: Any = files
    writer.save_file(
        {name: each.float().contiguous() for name, each in weights.items()}, folder / "model.safetensors"
    )


def logits_of(source: Any, dtype: str = "float32") -> Tensor:
    checkpoint = source.fetch(SPAN, embedding_and_head=True)
    config = ComputeConfig(device="cpu", dtype=dtype, threads=1, cache_bytes=1 << 22)
    ends = load_embedding_and_head(checkpoint, config)
    runner = open_runner(checkpoint, SPAN, config)
    ids = [(37 * index + 11) % 89 + 3 for index in range(30)]
    (hidden,) = runner.run([Chunk(runner.cache.reserve(64), 0, ends.embed(ids))])
    return ends.logits(hidden)


@pytest.mark.parametrize(
    "kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
)
def test_numbers_are_those_of_the_library_to_the_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_quants, "_PIECE_NUMBERS", 1024)  # so that several pieces are laid out
    number = library.GGMLQuantizationType[kind]
    if kind.endswith("_K"):
        content = random_blocks(kind, 6, 512)
    else:
        rows = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)).numpy()
        content = library.quantize(rows, number)
    expected = torch.from_numpy(library.dequantize(content, number).copy()).view(6, 512)
    stored = torch.from_numpy(np.ascontiguousarray(content).view(np.uint8).reshape(-1).copy())
    assert torch.equal(gguf_quants.dequantise(stored, kind, (6, 512)).float(), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("split", [1, 3])
def test_a_file_is_a_model_like_a_folder(family: str, split: int, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", family)
    path = tmp_path / "small.gguf"
    save(folder, write_gguf(folder, path, MIXED, split=split))
    source = resolve_model(str(parts_of(path, split)[-1]), cache_dir=tmp_path / "cache")
    expected = logits_of(resolve_model(str(folder), cache_dir=tmp_path / "cache"))
    assert torch.equal(logits_of(source), expected)
    assert source.spec.num_blocks == 2
    assert source.spec.dtype == "bfloat16"
    described = describe_model(str(parts_of(path, split)[-1]), cache_dir=tmp_path / "none")
    assert replace(described, weights=source.spec.weights, revision=source.spec.revision) == source.spec
    assert not (tmp_path / "none").exists()


def test_llama_3s_divisors_are_honoured(tmp_path: Path) -> None:
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {**scaled, "rope_theta": 10_000.0, "original_max_position_embeddings": 32}
    folder = make_folder(tmp_path / "model", rope_parameters=rope)
    from p2pinfer.models.compute.rope import Rope

    device = torch.device("cpu")
    plain, turned = (
        Rope(each, 64, device).at(torch.tensor([1]), torch.float64).sin[0, 0, 32:].asin()
        for each in ({"rope_type": "default", "rope_theta": 1e4}, rope)
    )
    divisors: list[float] = [float(each) for each in plain / turned]
    assert max(divisors) > 7
    path = tmp_path / "long.gguf"
    save(folder, write_gguf(folder, path, {}, divisors=divisors))
    expected = logits_of(resolve_model(str(folder), cache_dir=tmp_path / "cache"))
    found = logits_of(resolve_model(str(path), cache_dir=tmp_path / "cache"))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    assert not torch.allclose(logits_of(without_divisors(folder, tmp_path)), expected, atol=2e-2)


def without_divisors(folder: Path, tmp_path: Path) -> Any:
    path = tmp_path / "short.gguf"
    write_gguf(folder, path, {})
    return resolve_model(str(path), cache_dir=tmp_path / "cache")


def test_a_span_reads_its_own_tensors_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "model")
    path = tmp_path / "small.gguf"
    write_gguf(folder, path, MIXED)
    checkpoint = open_gguf(path, "m", cache_dir=tmp_path / "cache")
    read: list[str] = []
    from p2pinfer.models.checkpoint import gguf_shard

    module: Any = gguf_shard
    before = module.read_checked

    def noting(path: Path, name: str, *rest: Any) -> Tensor:
        read.append(name)
        found: Tensor = before(path, name, *rest)
        return found

    monkeypatch.setattr(gguf_shard, "read_checked", noting)
    open_runner(
        checkpoint, BlockSpan(1, 2), ComputeConfig(device="cpu", dtype="float32", cache_bytes=1 << 20)
    )
    assert read
    assert {name.split(".")[1] for name in read} == {"1"}


def test_an_honest_peer_of_a_quantised_file_passes_an_audit(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    path = tmp_path / "small.gguf"
    write_gguf(folder, path, {**MIXED, "k_proj": "Q8_0", "o_proj": "Q4_1"})
    checkpoint = open_gguf(path, "m", cache_dir=tmp_path / "cache")
    inputs = torch.randn(40, 256, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    runner = open_runner(checkpoint, SPAN, ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 20))
    (outputs,) = runner.run([Chunk(runner.cache.reserve(40), 0, inputs)])
    reference = open_reference(checkpoint, SPAN, max_tokens=64)

    def upper(given: Tensor) -> float:
        found = measure_span(reference, SPAN, inputs, given.float(), wire_dtype=torch.bfloat16)
        return max(chunk.upper_rho for chunk in found.chunks)

    assert upper(outputs) < 1.5 < 5 < upper(outputs * 1.1)


def test_a_changed_file_is_not_used(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    path = tmp_path / "small.gguf"
    write_gguf(folder, path, MIXED)
    checkpoint = open_gguf(path, "m", cache_dir=tmp_path / "cache")
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelChanged, match="its content differs"):
        for name in sorted(checkpoint.names()):
            checkpoint.read(name)


def test_hostile_headers_are_refused_in_a_line(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    path = tmp_path / "small.gguf"
    write_gguf(folder, path, MIXED)
    good = path.read_bytes()
    head = 24 + open_gguf_header(path).tensors["token_embd.weight"].start // 8
    tried = [good[:length] for length in (0, 3, 8, 24, 40, 200, head, len(good) - 1)]
    tried += [b"GGUF" + struct.pack("<IQQ", 3, *counts) for counts in ((1 << 60, 0), (0, 1 << 60), (5, 5))]
    tried += [b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), b"GGUF" + struct.pack("<IQQ", 9, 0, 0)]
    for content in tried:
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as refusal:
            open_gguf(path, "m", cache_dir=tmp_path / "cache")
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"llama__expert_count": 8}, "mixture"),
        ({"llama__rope__dimension_count": 32}, "part of each head"),
        ({"llama__attention__sliding_window": 32}, "sliding_window"),
        ({"llama__rope__scaling__type": "su", "llama__rope__scaling__factor": 2.0}, "unknown"),
    ],
)
def test_what_a_file_says_and_nothing_computes_is_refused(
    fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model")
    write_gguf(folder, tmp_path / "m.gguf", {}, **fields)
    with pytest.raises(CheckpointError, match=said):
        open_gguf(tmp_path / "m.gguf", "m", cache_dir=tmp_path / "cache")


def test_the_tokenizer_of_a_file_gives_the_ids_of_the_models_own(tmp_path: Path) -> None:
    """Merges and kinds as llama.cpp has them, of a tokenizer trained here, by two of its rules."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    for pre, split in (("gpt-2", None), ("smollm", pre_tokenizers.Digits(individual_digits=True))):
        made: Any = tokenizers.Tokenizer(models.BPE())
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.pre_tokenizer = by_bytes if split is None else pre_tokenizers.Sequence([split, by_bytes])
        made.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator([Path(__file__).read_text(), "12 34 567 8999"] * 3, trainer)
        model = json.loads(made.to_str())["model"]
        vocabulary = sorted(model["vocab"], key=model["vocab"].get)
        folder = make_folder(tmp_path / pre, vocab_size=len(vocabulary))
        write_gguf(
            folder,
            tmp_path / f"{pre}.gguf",
            {},
            tokenizer__ggml__model="gpt2",
            tokenizer__ggml__pre=pre,
            tokenizer__ggml__tokens=vocabulary,
            tokenizer__ggml__token_type=[3] + [1] * (len(vocabulary) - 1),
            tokenizer__ggml__merges=[" ".join(each) for each in model["merges"]],
            tokenizer__ggml__eos_token_id=0,
            tokenizer__chat_template="{{ messages }}",
        )
        opened = open_gguf(tmp_path / f"{pre}.gguf", "m", cache_dir=tmp_path / "cache")
        ours = load_tokenizer(opened.folder)
        text = "Numbers 12345, and words' ends; écriture 火 \n\n  x<|end|>y"
        assert ours.encode(text) == made.encode(text).ids
        assert ours.eos_ids == {0}
        assert (opened.folder / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_rule_that_is_not_known_makes_no_tokenizer(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    fields: dict[str, Any] = {"tokenizer__ggml__tokens": ["a"] * 96, "tokenizer__ggml__merges": ["a a"]}
    path = tmp_path / "m.gguf"
    write_gguf(folder, path, {}, **fields, tokenizer__ggml__model="gpt2", tokenizer__ggml__pre="new-rule")
    opened = open_gguf(path, "m", cache_dir=tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(opened.folder)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert (open_gguf(path, "m", cache_dir=tmp_path / "cache").folder / "tokenizer.json").read_text() == "{}"
