"""Embedding and LM head: token ids to hidden states, and hidden states to logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.progress import Progress, Silent

from .architecture import describe_architecture
from .families import Family
from .layers import Norm
from .target import Target, choose_target
from .weights import Weights

logger = logging.getLogger(__name__)


class EmbeddingAndHead:
    """Embedding, final norm and head, which a client runs itself.

    A head that is tied to the embedding is still held twice on a CPU: packed for the product, which halves
    its time (32000 x 1024 in bfloat16: 4.5 ms plain, 1.7 packed), and plain to look up rows in.

    Attributes:
        architecture: Of the model.
        norm: The final norm.
        head: The product that gives logits.
    """

    def __init__(self, checkpoint: Checkpoint, target: Target, progress: Progress) -> None:
        architecture = describe_architecture(checkpoint.config)
        shape = checkpoint.spec.vocab_size, checkpoint.spec.hidden_size
        names = embedding_and_head_names(checkpoint)
        weights = Weights(checkpoint, "", names, target, progress)
        family, hidden = architecture.family, shape[1]
        ends = names_of_ends(family)
        self.spec = checkpoint.spec
        self.architecture = architecture
        self.device = target.device
        self.dtype = target.dtype
        self._embedding = weights.table(_stored_of(ends.embedding, ends.head, names), *shape)
        scale = torch.tensor(architecture.embedding_scale)
        # Gemma's is rounded to the model's dtype like transformers' own.
        self._scale = scale.to(target.dtype if family.scaled_embedding else torch.float32).item()

        def norm(name: str) -> Norm:
            if family.norm == "layer":
                return weights.layer_norm(name, hidden, eps=architecture.norm_eps, bias=family.norm_bias)
            return weights.norm(name, hidden, eps=architecture.norm_eps, offset=family.norm_offset)

        self._embedding_norm = norm(ends.embedding_norm) if ends.embedding_norm else None
        self.norm = norm(ends.norm)
        head = _stored_of(ends.head, ends.embedding, names)
        self.head = weights.linear((head,), hidden, (shape[0],), bias=family.head_bias)
        if architecture.tied_head and _holds_both(ends, names) and _differ(checkpoint, ends):
            logger.warning(
                "the config of %s ties the head to the embedding, but its files contain a separate head: "
                "that one is used, as transformers does",
                checkpoint.spec.model,
            )

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """The hidden states that enter block 0, (tokens, hidden_size), on the CPU."""
        with torch.inference_mode():
            ids = torch.tensor(token_ids, dtype=torch.long, device=self.device)
            hidden = functional.embedding(ids, self._embedding)
            hidden = hidden * self._scale if self._scale != 1 else hidden
            return (hidden if self._embedding_norm is None else self._embedding_norm(hidden)).cpu()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits, (tokens, vocab_size) in float32 on the CPU, of what left the last block."""
        with torch.inference_mode():
            logits = self.head(self.norm(hidden.to(self.device, self.dtype)))
            return self.scaled(logits.float()).cpu()

    def scaled(self, logits: Tensor) -> Tensor:
        """Logits, scaled and under their soft cap, of what the head gave in float32; differentiable."""
        softcap, scale = self.architecture.logit_softcap, self.architecture.logit_scale
        logits = logits if scale == 1 else logits * scale
        return logits if softcap is None else (logits / softcap).tanh() * softcap


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


class EndNames(NamedTuple):
    """Names of the tensors at a model's ends, less `.weight`."""

    embedding: str
    embedding_norm: str | None
    norm: str
    head: str


def names_of_ends(family: Family) -> EndNames:
    """Names of a family's embedding, norms and head."""
    prefix = family.root
    inner = None if family.embedding_norm is None else f"{prefix}.{family.embedding_norm}"
    return EndNames(f"{prefix}.{family.embedding}", inner, f"{prefix}.{family.final_norm}", family.head)


def embedding_and_head_names(checkpoint: Checkpoint) -> frozenset[str]:
    """The tensors of embedding, norms and head.

    A config that ties the head to the embedding is believed only as far as the file agrees: where it holds
    both, each is used, and where it holds one, that is both. transformers 5 does the same.
    """
    family = describe_architecture(checkpoint.config).family
    ends, stored = names_of_ends(family), checkpoint.names()
    tied = checkpoint.config["tie_word_embeddings"]
    tables = [name for name in (ends.embedding, ends.head) if not tied or f"{name}.weight" in stored]
    names = {f"{name}.weight" for name in (ends.norm, *(tables or [ends.embedding]))}
    if ends.embedding_norm is not None:
        names.add(f"{ends.embedding_norm}.weight")
    if family.norm_bias:
        names |= {f"{name}.bias" for name in (ends.norm, ends.embedding_norm) if name is not None}
    if family.head_bias and f"{ends.head}.bias" in stored:
        names.add(f"{ends.head}.bias")
    return frozenset(names)


def _stored_of(wanted: str, other: str, names: frozenset[str]) -> str:
    """The one of two tied tables that is stored, the wanted one if both are."""
    return wanted if f"{wanted}.weight" in names else other


def _holds_both(ends: EndNames, names: frozenset[str]) -> bool:
    return {f"{ends.embedding}.weight", f"{ends.head}.weight"} <= names


def _differ(checkpoint: Checkpoint, ends: EndNames) -> bool:
    head = checkpoint.read(f"{ends.head}.weight")
    return not torch.equal(checkpoint.read(f"{ends.embedding}.weight"), head)
