"""Sizes of well-known models as they were published, for sums that need no file of theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Shape:
    """A model by its published sizes."""

    model: str
    family: str  # the config's model_type
    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    positions: int

    @property
    def block_parameters(self) -> int:
        """Weights of one block, norms and biases left out, as `ModelSpec` counts them."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        return self.hidden * (attention + 3 * self.feed_forward)

    def config(self) -> dict[str, Any]:
        """The part of its config.json that says how large it is."""
        return {
            "model_type": self.family,
            "dtype": "bfloat16",
            "num_hidden_layers": self.blocks,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.feed_forward,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
        }


SHAPES: Final = (
    Shape("HuggingFaceTB/SmolLM2-135M", "llama", 30, 576, 9, 3, 64, 1536, 49152, 8192),
    Shape("Qwen/Qwen3-0.6B", "qwen3", 28, 1024, 16, 8, 128, 3072, 151936, 40960),
    Shape("meta-llama/Llama-3.2-1B", "llama", 16, 2048, 32, 8, 64, 8192, 128256, 131072),
    Shape("Qwen/Qwen3-8B", "qwen3", 36, 4096, 32, 8, 128, 12288, 151936, 40960),
    Shape("Qwen/Qwen3-32B", "qwen3", 64, 5120, 64, 8, 128, 25600, 151936, 40960),
    Shape("meta-llama/Llama-3.3-70B-Instruct", "llama", 80, 8192, 64, 8, 128, 28672, 128256, 131072),
)


def published_shape(model: str) -> Shape | None:
    """Sizes of the model of that id, whatever revision it names; None where they are not known here."""
    name = model.partition("@")[0].casefold()
    return next((shape for shape in SHAPES if shape.model.casefold() == name), None)
