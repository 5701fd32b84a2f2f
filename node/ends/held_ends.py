"""Embedding and head that a node holds beside its blocks, for clients that hold no weights.

They are loaded where the span reaches an end of the model and memory leaves room for much more than them:
blocks, caches and the operator's other programs come first. Embedding and head are used in the worker's
thread alone, as the blocks are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from torch import Tensor

from p2pinfer.errors import P2PInferError
from p2pinfer.models.checkpoint.source import ModelSource
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead, load_embedding_and_head
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.machine.memory import free_memory
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.log_probabilities import log_probabilities
from p2pinfer.models.text.processors import Processors
from p2pinfer.models.text.sampling import Sampler
from p2pinfer.node.protocol.draws import Draw, Draws, Log, encode_draws

logger = logging.getLogger(__name__)

_SPARE: Final = 4  # times what they take has to be free
_BYTES_PER_WEIGHT: Final = 8  # float32 at most, to look rows up in and packed for the product
_MOST_TO_FETCH: Final = 1 << 30  # bytes


def load_held_ends(source: ModelSource, span: BlockSpan, compute: ComputeConfig) -> EmbeddingAndHead | None:
    """Embedding and head, if the span reaches an end and there is room for them; None otherwise."""
    spec = source.spec
    if span.start and span.stop < spec.num_blocks:
        return None
    if (needed := _SPARE * ends_bytes(spec)) > free_memory().bytes:
        logger.info("no embedding and head for clients without weights: that takes %d bytes free", needed)
        return None
    if source.missing_bytes(None, embedding_and_head=True) > _MOST_TO_FETCH:
        return None
    try:
        return load_embedding_and_head(source.fetch(None, embedding_and_head=True), compute)
    except P2PInferError as exc:  # the blocks serve without
        logger.warning("clients without weights are not served here: %s", exc)
        return None


def ends_bytes(spec: ModelSpec) -> int:
    """Memory that embedding and head take at most."""
    return 2 * spec.vocab_size * spec.hidden_size * _BYTES_PER_WEIGHT // 2


class Drawer:
    """Draws the tokens of one session from what leaves the last block.

    Args:
        ends: The model's.
        draw: By which terms.

    Raises:
        ConfigError: The terms make no sense, or need what is not seen here.
    """

    def __init__(self, ends: EmbeddingAndHead, draw: Draw) -> None:
        self._ends = ends
        self._logprobs = draw.logprobs
        self._sampler = Sampler(draw.sampling())
        # Rules that look at tokens are refused, so the number of ids is all that matters.
        self._process = Processors(draw.logits_rules(), range(draw.prompt_tokens), draw.max_ids, draw.eos_ids)

    def draw(self, rows: Tensor, position: int) -> bytes:
        """The tokens behind `position` and the positions after it, as they travel.

        Args:
            rows: (n, hidden_size), hidden states of these positions after the last block.
        """
        logits = self._ends.logits(rows)
        ids = tuple(self._pick(row, position + 1 + index) for index, row in enumerate(logits))
        count = self._logprobs
        logs = () if count is None else self._logs(logits, ids, count)
        return encode_draws(Draws(ids, logs))

    def _pick(self, logits: Tensor, length: int) -> int:
        process = self._process
        return self._sampler.pick(process(logits, range(length)) if process.applies else logits, length)

    def _logs(self, logits: Tensor, ids: Sequence[int], count: int) -> tuple[Log, ...]:
        found = (log_probabilities(row, token_id, count) for row, token_id in zip(logits, ids, strict=True))
        return tuple(Log(each.token, each.likeliest) for each in found)
