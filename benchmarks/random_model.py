"""Models of a shape with random weights, made where they are computed: nothing is stored, fetched or hashed.

    python benchmarks/random_model.py node --model random:70b --device cuda:0,cuda:1 ...

runs `p2pinfer` with such models known by name. A tensor is the same in every process, since its name is what
its numbers are drawn from; on another kind of card they may differ.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import p2pinfer.client as asking
import p2pinfer.models
import p2pinfer.node.node as serving
from p2pinfer.cli.app import main
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.model_source import Missing
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL, ModelSource, resolve_model
from p2pinfer.models.checkpoint.spec import model_spec
from p2pinfer.models.configs.defaults import complete_config
from p2pinfer.models.pieces.manifest import Holdings, Manifest
from p2pinfer.models.progress import Progress
from p2pinfer.models.span import BlockSpan

PREFIX = "random:"
STD = 0.02  # of the weights, as transformers begins a training
_LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
# blocks, hidden size, heads, KV heads, size of the feed-forward layer, vocabulary
_SIZES: Mapping[str, tuple[int, int, int, int, int, int]] = {
    "70b": (80, 8192, 64, 8, 28672, 128256),  # Llama-3.1-70B
    "8b": (32, 4096, 32, 8, 14336, 128256),
    "1b": (16, 2048, 32, 8, 8192, 128256),
    "tiny": (8, 256, 8, 2, 512, 4096),
}


def config_of(name: str) -> dict[str, Any]:
    """config.json of a shape."""
    blocks, hidden, heads, kv_heads, inner, vocabulary = _SIZES[name]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": blocks,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **_LLAMA3,
    }


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama, by name."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    table = (config["vocab_size"], hidden)
    shapes = {"model.embed_tokens": table, "model.norm": (hidden,), "lm_head": table}
    for block in range(config["num_hidden_layers"]):
        of_block = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes |= {f"model.layers.{block}.{name}": shape for name, shape in of_block.items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def draw(name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A tensor by its name, bfloat16."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    empty = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return empty.normal_(0, STD, generator=generator)


class RandomCheckpoint(Checkpoint):
    """A checkpoint that makes its tensors when they are read, on the first card if there is one."""

    def __init__(self, name: str) -> None:
        config = config_of(name)
        spec = model_spec(PREFIX + name, config, {"random.safetensors": "0" * 64}, stored_dtype="bfloat16")
        folder = Path(p2pinfer.models.__path__[0], BUNDLED_MODEL)  # for its tokenizer: any will do
        super().__init__(folder, spec, {}, complete_config(PREFIX + name, config))
        self._shapes = shapes_of(config)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def names(self) -> frozenset[str]:
        """See `Checkpoint`."""
        return frozenset(self._shapes)

    def block_names(self, index: int) -> frozenset[str]:
        """See `Checkpoint`."""
        return frozenset(name for name in self._shapes if name.startswith(f"model.layers.{index}."))

    def bytes_of(self, names: Iterable[str]) -> int:
        """See `Checkpoint`."""
        return sum(2 * torch.Size(self._shapes[name]).numel() for name in names)

    def read(self, name: str) -> Tensor:
        """See `Checkpoint`; on the card."""
        return draw(name, self._shapes[name], self._device)


class RandomSource:
    """A model of a shape as `ModelSource`."""

    def __init__(self, name: str) -> None:
        self._checkpoint = RandomCheckpoint(name)
        self.spec = self._checkpoint.spec

    def fetch(
        self, span: BlockSpan | None, *, embedding_and_head: bool, progress: Progress | None = None
    ) -> Checkpoint:
        """See `ModelSource`."""
        return self._checkpoint

    def fetch_words(self, *, progress: Progress | None = None) -> Path:
        """See `ModelSource`."""
        return self._checkpoint.folder

    def missing_bytes(self, span: BlockSpan | None, *, embedding_and_head: bool) -> int:
        """See `ModelSource`."""
        return 0

    def missing(self, span: BlockSpan | None, *, embedding_and_head: bool) -> Missing:
        """See `ModelSource`."""
        return Missing(self._checkpoint.folder)

    def holdings(self) -> Holdings:
        """See `ModelSource`: nothing, since peers make the same tensors."""
        return Holdings(Manifest(self.spec.model, self.spec.numbers, (), ()), {}, self._checkpoint.folder)


def resolve(model: str, **options: Any) -> ModelSource:
    """As `resolve_model`, which knows no random ones."""
    if model.startswith(PREFIX):
        return RandomSource(model.removeprefix(PREFIX))
    return resolve_model(model, **options)


def install() -> None:
    """Have clients and nodes of this process know random models."""
    asking.resolve_model = resolve
    serving.resolve_model = resolve


if __name__ == "__main__":
    install()
    main()
