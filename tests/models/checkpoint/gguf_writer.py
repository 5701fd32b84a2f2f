"""GGUF files of a model folder, written by the package `gguf` as llama.cpp's converter lays them out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import torch as files
from torch import Tensor

library: Any = gguf
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BYTES = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> Any:
    """Bytes of a k-quantised matrix with sane scales: the library lays them out, and writes none."""
    generator = torch.Generator().manual_seed(seed)
    count, size = rows * columns // 256, _BYTES[kind]
    blocks = torch.randint(0, 256, (count, size), dtype=torch.uint8, generator=generator).numpy()
    scales = (torch.rand(count, 2, generator=generator) * 0.002 + 0.001).half().numpy().view(np.uint8)
    blocks[:, -2:] = scales[:, :2] if kind == "Q6_K" else blocks[:, -2:]
    if kind != "Q6_K":
        blocks[:, :4] = scales
    return blocks.reshape(rows, -1)


def write_gguf(
    folder: Path,
    path: Path,
    kinds: Mapping[str, str],
    *,
    divisors: list[float] | None = None,
    split: int = 1,
    **fields: Any,
) -> dict[str, Tensor]:
    """Write the model of a folder; its weights as the file has them, by their names in the folder.

    Args:
        kinds: ggml types by the last part of a name, such as `down_proj`; others are F32.
        divisors: Of the rotary embedding's frequencies.
        split: Number of files, `path` being the first.
        fields: Further metadata by key, with `__` for a dot.
    """
    config = json.loads((folder / "config.json").read_text())
    loader: Any = files
    weights: dict[str, Tensor] = loader.load_file(folder / "model.safetensors")
    writers = [library.GGUFWriter(each, config["model_type"]) for each in parts_of(path, split)]
    for writer in writers:
        _write_metadata(writer, config, fields)
    written: dict[str, Tensor] = {}
    names = sorted(weights)
    if divisors is not None:
        writers[0].add_tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32))
    for number, name in enumerate(names):
        writer = writers[number * split // len(names)]
        written[name] = _write(writer, name, weights[name], kinds, config)
    for writer in writers:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return written


def parts_of(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{each:05}-of-{count:05}.gguf") for each in range(1, count + 1)]


def _write(
    writer: Any, name: str, weight: Tensor, kinds: Mapping[str, str], config: Mapping[str, Any]
) -> Tensor:
    stem, _, part = name.rpartition(".")
    kind = kinds.get(stem.rpartition(".")[2], "F32") if weight.dim() > 1 else "F32"
    number = library.GGMLQuantizationType[kind]
    stored = permuted(name, weight, config)
    if kind in _BYTES:
        content = random_blocks(kind, weight.shape[0], weight.shape[1], seed=len(name))
    else:
        content = library.quantize(stored.float().numpy(), number)
    writer.add_tensor(_gguf_name(stem, part), content, raw_dtype=None if kind == "F32" else number)
    exact = torch.from_numpy(library.dequantize(content, number).copy()).view(weight.shape)
    return permuted(name, exact, config, back=True)


def permuted(name: str, weight: Tensor, config: Mapping[str, Any], *, back: bool = False) -> Tensor:
    """Rows of Llama's queries and keys in the order of llama.cpp, whose rotation takes neighbours."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None or config["model_type"] != "llama":
        return weight.contiguous()
    shape = (config[heads], -1, 2) if back else (config[heads], 2, -1)
    return weight.view(*shape, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape).contiguous()


def _gguf_name(stem: str, part: str) -> str:
    if stem in _ENDS:
        return f"{_ENDS[stem]}.{part}"
    _, _, block, rest = stem.split(".", 3)
    return f"blk.{block}.{_PARTS[rest]}.{part}"


def _write_metadata(writer: Any, config: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(config.get("rope_theta", 10_000.0))
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    for key, value in fields.items():
        name = key.replace("__", ".")
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_string(name, value)
