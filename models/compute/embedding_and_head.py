"""Embedding and LM head: token ids to hidden states, and hidden states to logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.progress import Progress, Silent

from .families import describe_architecture
from .target import Target, choose_target
from .weights import Weights

logger = logging.getLogger(__name__)

EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


class EmbeddingAndHead:
    """Embedding, final norm and head, which a client runs itself.

    A head that is tied to the embedding is still held twice on a CPU: packed for the product, which halves
    its time (32000 x 1024 in bfloat16: 4.5 ms plain, 1.7 packed), and plain to look up rows in.

    Attributes:
        architecture: Of the model.
        norm: The final norm.
        head: The product that gives logits.
        softcap: Bound of the logits, or None.
    """

    def __init__(self, checkpoint: Checkpoint, target: Target, progress: Progress) -> None:
        architecture = describe_architecture(checkpoint.config)
        shape = checkpoint.spec.vocab_size, checkpoint.spec.hidden_size
        names = embedding_and_head_names(checkpoint)
        weights = Weights(checkpoint, "", names, target, progress)
        self.spec = checkpoint.spec
        self.architecture = architecture
        self.device = target.device
        self.dtype = target.dtype
        self._embedding = weights.table(_embedding_of(names), *shape)
        # Rounded to the model's dtype like transformers' own.
        self._scale = torch.tensor(architecture.embedding_scale, dtype=target.dtype).item()
        offset = architecture.family.norm_offset
        self.norm = weights.norm(NORM, shape[1], eps=architecture.norm_eps, offset=offset)
        self.head = weights.linear((_head_of(names),), shape[1], (shape[0],))
        if architecture.tied_head and len(names) == 3 and _differ(checkpoint):
            logger.warning(
                "the config of %s ties the head to the embedding, but its files contain a separate head: "
                "that one is used, as transformers does",
                checkpoint.spec.model,
            )
        self.softcap = architecture.logit_softcap

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """The hidden states that enter block 0, (tokens, hidden_size), on the CPU."""
        with torch.inference_mode():
            ids = torch.tensor(token_ids, dtype=torch.long, device=self.device)
            hidden = functional.embedding(ids, self._embedding)
            return (hidden * self._scale if self._scale != 1 else hidden).cpu()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits, (tokens, vocab_size) in float32 on the CPU, of what left the last block."""
        with torch.inference_mode():
            logits = self.head(self.norm(hidden.to(self.device, self.dtype))).float()
            if self.softcap is not None:
                logits = (logits / self.softcap).tanh_().mul_(self.softcap)
            return logits.cpu()


def load_embedding_and_head(
    checkpoint: Checkpoint, config: ComputeConfig, *, progress: Progress | None = None
) -> EmbeddingAndHead:
    """Read the embedding, the final norm and the head.

    Raises:
        CheckpointError: A tensor is missing or misshapen.
        ConfigError: The config asks for a device or a dtype that is not to be had.
    """
    target = choose_target(config, checkpoint.spec.dtype)
    progress = progress or Silent()
    progress.start("loading embedding and head", checkpoint.bytes_of(embedding_and_head_names(checkpoint)))
    try:
        return EmbeddingAndHead(checkpoint, target, progress)
    finally:
        progress.done()


def embedding_and_head_names(checkpoint: Checkpoint) -> frozenset[str]:
    """The tensors of embedding, final norm and head.

    A config that ties the head to the embedding is believed only as far as the file agrees: where it holds
    both, each is used, and where it holds one, that is both. transformers 5 does the same.
    """
    stored = checkpoint.names()
    tied = checkpoint.config["tie_word_embeddings"]
    ends = [name for name in (EMBEDDING, HEAD) if not tied or f"{name}.weight" in stored]
    return frozenset(f"{name}.weight" for name in (NORM, *(ends or [EMBEDDING])))


def _embedding_of(names: frozenset[str]) -> str:
    return EMBEDDING if f"{EMBEDDING}.weight" in names else HEAD


def _head_of(names: frozenset[str]) -> str:
    return HEAD if f"{HEAD}.weight" in names else EMBEDDING


def _differ(checkpoint: Checkpoint) -> bool:
    head = checkpoint.read(f"{HEAD}.weight")
    return not torch.equal(checkpoint.read(f"{EMBEDDING}.weight"), head)
