"""Guesses of a draft model: a small model with the tokenizer of a large one, run where the results land.

It chooses its tokens as the large one's are chosen: by the same rules, and with the same noise at the same
position. So where the two models agree about the chances they nearly always draw the same token, at any
temperature (Daliri et al., 2024, of which `models/text/sampling.py` has the noise). The text never depends on
a draft model: a guess is only ever compared with the token that was drawn.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Final, TypeAlias

from torch import Tensor

from p2pinfer.client_config import MAX_DEPTH
from p2pinfer.errors import CacheFull, ConfigError
from p2pinfer.models.compute.blocks import Blocks
from p2pinfer.models.compute.cache import PagedCache
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.compute.runner import Chunk, SpanRunner
from p2pinfer.models.compute.stage import Stage
from p2pinfer.models.text.text import Tokenizer

_PAGE_TOKENS: Final = 64
_READ_TOKENS: Final = 512  # of a prompt, at once
_LAST_PASSES: Final = 15  # whose median counts
# Texts that draft at the same time. One more would wait for passes of all others: 200 texts that did so took
# all threads that draw tokens, for half a second in which nothing could be cancelled.
_AT_ONCE: Final = 2

Choose: TypeAlias = Callable[[Tensor, Sequence[int]], int]  # logits (vocab,), all tokens before -> the token


class DraftModel:
    """The weights of a draft model, for any number of texts."""

    def __init__(self, blocks: Blocks, ends: EmbeddingAndHead, vocab_size: int) -> None:
        """Only tokens below `vocab_size`, that of the model to guess for, are ever guessed."""
        self.blocks = blocks
        self.ends = ends
        self.vocab_size = min(vocab_size, ends.spec.vocab_size)
        self.lock = threading.Lock()  # texts are drafted in threads of their own
        self.places = threading.BoundedSemaphore(_AT_ONCE)


class ModelDrafter:
    """Drafts for one text, which may only grow. Not thread-safe: one call at a time."""

    def __init__(self, model: DraftModel, max_ids: int, choose: Choose) -> None:
        """Draft for a text of up to `max_ids` tokens, whose tokens are chosen from logits by `choose`."""
        self._model = model
        self._room = min(max_ids + MAX_DEPTH, model.ends.spec.max_positions)
        self._choose = choose
        self._runner: SpanRunner | None = None  # made with the first draft, in the thread that drafts
        self._ids: list[int] = []  # in the cache, all but the last one at most
        self._given = 0  # the first so many of them are the text's, and no guesses
        self._passes_s = deque[float](maxlen=_LAST_PASSES)

    @property
    def guess_s(self) -> float:
        """Seconds that a guess takes; 0 before the first."""
        return median(self._passes_s) if self._passes_s else 0.0

    def guesses(self, ids: Sequence[int], last_id: int) -> Iterator[tuple[int, float]]:
        """Guesses at what follows `ids` and then `last_id`, each with the draft model's probability of it.

        Each takes a pass through the draft model when it is asked for. They end where its context does, and
        there are none while other texts draft.

        Raises:
            ConfigError: The text has a token that the draft model does not know.
            CacheFull: There is no memory for its cache.
        """
        if not self._model.places.acquire(blocking=False):
            return
        try:
            yield from self._guesses(self._take(ids, last_id))
        finally:
            self._model.places.release()

    def _guesses(self, new: list[int]) -> Iterator[tuple[int, float]]:
        while len(self._ids) < self._room:
            started = time.perf_counter()
            logits = self._pass(new)
            token_id = self._choose(logits, self._ids)
            probability = float(logits.softmax(0)[token_id])
            if len(new) == 1:
                self._passes_s.append(time.perf_counter() - started)
            yield token_id, probability
            self._ids.append(token_id)
            new = [token_id]

    def _take(self, ids: Sequence[int], last_id: int) -> list[int]:
        """Bring `_ids` up to the text; returns its last tokens, those that the cache has to be given."""
        at = self._given  # what was the text's is the text's still
        while at < min(len(self._ids), len(ids)) and self._ids[at] == ids[at]:
            at += 1
        cached = min(at, self._cached)
        new = [*ids[cached:], last_id]
        if max(new) >= self._model.vocab_size:
            raise ConfigError(f"the draft model has no token {max(new)}")
        self._ids[cached:] = new
        self._given = len(ids)
        return new

    @property
    def _cached(self) -> int:
        return 0 if self._runner is None else self._lease.length

    def _pass(self, new: Sequence[int]) -> Tensor:
        """Logits (vocab,) after the last of `new`, which are the last of `_ids`."""
        model, runner = self._model, self._runner or self._open()
        begin = len(self._ids) - len(new)
        with model.lock:
            for at in range(0, len(new) - 1, _READ_TOKENS):
                read = new[at : min(at + _READ_TOKENS, len(new) - 1)]
                runner.run([Chunk(self._lease, begin + at, model.ends.embed(read))])
            (hidden,) = runner.run([Chunk(self._lease, len(self._ids) - 1, model.ends.embed(new[-1:]))])
            return model.ends.logits(hidden)[0, : model.vocab_size]

    def _open(self) -> SpanRunner:
        blocks = self._model.blocks
        shape = blocks.architecture
        pages = -(-self._room // _PAGE_TOKENS)
        token_bytes = len(blocks.span) * 2 * shape.kv_heads * shape.head_dim * blocks.dtype.itemsize
        try:
            cache = PagedCache(
                layout=[(blocks.device, len(blocks.span))],
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                dtype=blocks.dtype,
                budget_bytes=pages * _PAGE_TOKENS * token_bytes,
                page_tokens=_PAGE_TOKENS,
            )
        except RuntimeError as exc:  # torch's for memory that is not to be had
            raise CacheFull(f"no memory for the draft model's cache: {exc}") from exc
        self._runner = SpanRunner([Stage(blocks, cache.pools[0])], cache)
        self._lease = cache.reserve(self._room)
        return self._runner


def check_tokenizers(name: str, draft: Tokenizer, model: str, tokenizer: Tokenizer) -> None:
    """Nothing, if a draft model's token ids mean what they mean to the model it is to guess for.

    Raises:
        ConfigError: They do not.
    """
    ours, theirs = tokenizer.vocabulary(), draft.vocabulary()
    if ours == theirs:
        return
    differing = {*ours.items()} ^ {*theirs.items()}
    token_id = min(token_id for _, token_id in differing)
    of_draft, of_model = draft.piece(token_id), tokenizer.piece(token_id)
    raise ConfigError(
        f"{name} cannot draft for {model}, since their tokenizers differ: token {token_id} is {of_draft!r} "
        f"in the one and {of_model!r} in the other; use a smaller model of the same family, or --draft off"
    )
