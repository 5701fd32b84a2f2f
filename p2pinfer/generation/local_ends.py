"""Embedding and head that run here, and draws from their logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.text.grammar import Grammar
from p2pinfer.models.text.log_probabilities import LogProbabilities, log_probabilities
from p2pinfer.models.text.processors import Processors
from p2pinfer.models.text.sampling import Sampler
from p2pinfer.models.text.text import Tokenizer

from .draft_model import DraftModel, ModelDrafter
from .first_state import sampling_of
from .saved_state import GenerationState
from .transcript import Transcript


class LocalEnds:
    """Ends of one text; see `Ends`. Its outputs are hidden states.

    Attributes:
        sampler: What draws.
    """

    def __init__(
        self,
        embedding_and_head: EmbeddingAndHead,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        state: GenerationState,
        transcript: Transcript,
        logprobs: int | None = None,
    ) -> None:
        """`logprobs` is how many of the likeliest tokens' log probabilities come with each token."""
        self._embedding_and_head = embedding_and_head
        self.sampler = Sampler(sampling_of(state))
        self._logprobs = logprobs
        self._max_ids = transcript.max_ids
        grammar = _grammar_of(state, spec, tokenizer, transcript)
        self._process = Processors(
            state.rules, state.prompt_ids, transcript.max_ids, transcript.eos_ids, grammar
        )

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """(tokens, hidden_size)."""
        return self._embedding_and_head.embed(token_ids)

    def split(self, outputs: Tensor) -> Sequence[Tensor]:
        """(1, hidden_size) each."""
        return torch.split(outputs, 1)

    def draw(self, output: Tensor, ids: Sequence[int]) -> tuple[int, LogProbabilities | None]:
        """See `Ends`."""
        logits = self._embedding_and_head.logits(output)[-1]
        token_id = self.choose(logits, ids)
        return token_id, None if self._logprobs is None else log_probabilities(
            logits, token_id, self._logprobs
        )

    def choose(self, logits: Tensor, ids: Sequence[int]) -> int:
        """The token behind `ids` that logits (vocab,) give, by the text's rules, settings and seed."""
        process = self._process
        return self.sampler.pick(process(logits, ids) if process.applies else logits, len(ids))

    def drafter(self, model: DraftModel) -> ModelDrafter:
        """Drafter that draws by the same rules, settings and seed from what `model` computes."""
        return ModelDrafter(model, self._max_ids, self.choose)


def _grammar_of(
    state: GenerationState, spec: ModelSpec, tokenizer: Tokenizer, transcript: Transcript
) -> Grammar | None:
    if not state.grammar:
        return None
    prompt_tokens = len(state.prompt_ids)
    return tokenizer.vocabularies.follow(state.grammar, prompt_tokens, spec.vocab_size, transcript.eos_ids)
