"""Config and tensor names of a GGUF file, in transformers' terms.

llama.cpp renames tensors, and for Llama's family it reorders the rows of queries and keys, since it rotates
numbers that lie side by side. Both are undone here. A scaling of Llama 3's kind is no key but a tensor of
divisors, `rope_freqs.weight`; transformers drops it when it reads a GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from p2pinfer.errors import CheckpointError

# By llama.cpp's name of an architecture: transformers', and whether rows of queries and keys are reordered.
_ARCHITECTURES: Final[Mapping[str, tuple[str, bool]]] = {
    "llama": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
ROPE_DIVISORS: Final = "rope_freqs.weight"
_ENDS: Final[Mapping[str, str]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_PARTS: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK: Final = re.compile(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)")
_END: Final = re.compile(r"(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Place:
    """Place of a tensor in a model.

    Attributes:
        name: In transformers' terms.
        heads: Heads whose rows are to be put back in order; 0: none.
    """

    name: str
    heads: int = 0


class GgufModel:
    """Metadata of a GGUF model, read as a config.

    Args:
        model: The name for people.
        metadata: Of the first file.
    """

    def __init__(self, model: str, metadata: Mapping[str, Any]) -> None:
        self._model = model
        self._metadata = metadata
        self._architecture = str(metadata.get("general.architecture"))
        if self._architecture not in _ARCHITECTURES:
            raise CheckpointError(
                f"{model} is a GGUF of the architecture {self._architecture:.40}; p2pinfer reads "
                f"{', '.join(_ARCHITECTURES)} in GGUF, and others as safetensors"
            )
        self._family, self._reordered = _ARCHITECTURES[self._architecture]
        if self._get("expert_count"):
            raise CheckpointError(f"{model} is a GGUF of a mixture of experts; use its safetensors")

    def place(self, name: str) -> Place:
        """Place of a tensor of the file.

        Raises:
            CheckpointError: Nothing here knows it.
        """
        if found := _BLOCK.fullmatch(name):
            part = _PARTS.get(found[2])
            if part is not None:
                heads = 0
                if self._reordered and found[2] in ("attn_q", "attn_k"):
                    heads = self._heads("" if found[2] == "attn_q" else "_kv")
                return Place(f"model.layers.{int(found[1])}.{part}.{found[3]}", heads)
        elif (end := _END.fullmatch(name)) and end[1] in _ENDS:
            return Place(f"{_ENDS[end[1]]}.{end[2]}")
        raise CheckpointError(
            f"{self._model} has the tensor {name:.60}, which p2pinfer does not know in a GGUF of "
            f"{self._architecture}"
        )

    def config(
        self, names: frozenset[str], vocab_size: int, divisors: Sequence[float] | None
    ) -> dict[str, Any]:
        """Contents of a config.json of this model.

        Args:
            names: Of all tensors, in transformers' terms.
            vocab_size: Rows of the embedding.
            divisors: Those of the rotary embedding's frequencies, where the file has some.
        """
        heads, hidden = self._heads(""), self._size("embedding_length")
        context = self._size("context_length")
        head_dim = self._get("attention.key_length") or hidden // heads
        config: dict[str, Any] = {
            "model_type": self._family,
            "hidden_size": hidden,
            "intermediate_size": self._size("feed_forward_length"),
            "num_hidden_layers": self._size("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._heads("_kv"),
            "head_dim": head_dim,
            "vocab_size": vocab_size,
            "max_position_embeddings": context,
            "rms_norm_eps": self._decimal("attention.layer_norm_rms_epsilon", 1e-5),
            "tie_word_embeddings": "lm_head.weight" not in names,
            "rope_parameters": self._rope(context, head_dim, divisors),
        }
        if self._family == "llama":
            config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in names
            config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in names
        if self._get("attention.value_length") not in (None, head_dim):
            self._refuse("attention.value_length", "values would be shorter than keys")
        if self._get("attention.sliding_window"):
            self._refuse("attention.sliding_window", "which blocks it is for is not said")
        return config

    def _rope(self, context: int, head_dim: int, divisors: Sequence[float] | None) -> dict[str, Any]:
        theta = self._decimal("rope.freq_base", 10_000.0)
        if self._get("rope.dimension_count") not in (None, head_dim):
            self._refuse("rope.dimension_count", "only part of each head would be rotated")
        kind = self._get("rope.scaling.type") or "none"
        factor = self._decimal("rope.scaling.factor", 0.0)
        if kind in ("linear", "yarn") and factor and divisors is None:
            rope: dict[str, Any] = {"rope_type": kind, "rope_theta": theta, "factor": factor}
            if kind == "yarn":
                original = self._get("rope.scaling.original_context_length") or context
                rope["original_max_position_embeddings"] = original
            return rope
        if kind != "none" and factor:
            self._refuse("rope.scaling.type", f"{kind} with divisors, or unknown")
        if divisors is None:
            return {"rope_type": "default", "rope_theta": theta}
        # One divisor for each frequency at any length: longrope whose two lists are equal.
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": list(divisors),
            "long_factor": list(divisors),
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": context,
        }

    def _heads(self, which: str) -> int:
        found = self._get(f"attention.head_count{which}")
        if found is None and which:
            return self._heads("")
        if type(found) is not int or found < 1:
            self._refuse(f"attention.head_count{which}", "it has to be one whole number")
        return found

    def _size(self, key: str) -> int:
        found = self._get(key)
        if type(found) is not int or found < 1:
            self._refuse(key, "it has to be a whole number")
        return found

    def _decimal(self, key: str, otherwise: float) -> float:
        """A number that was a decimal before it was put in single precision: 9.99...e-6 was 1e-5."""
        found = self._get(key)
        return otherwise if not isinstance(found, int | float) else float(f"{found:.7g}")

    def _get(self, key: str) -> Any:
        return self._metadata.get(f"{self._architecture}.{key}")

    def _refuse(self, key: str, why: str) -> NoReturn:
        full = f"{self._architecture}.{key}"
        raise CheckpointError(
            f"{self._model} says {full} = {self._metadata.get(full)!r:.60} in its GGUF, which p2pinfer does "
            f"not support: {why}"
        )
