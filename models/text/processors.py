"""Logits processors, applied before a token is chosen greedily or drawn.

Every rule here is a logits processor of transformers' `generate`, computed in the same order and with the
same operations (`_get_logits_processor` in generation/utils.py), so that greedy tokens are the same.
Whatever narrows a draw alone, such as top_p, is in `sampling`.

A processor gets a copy of the logits to change in place, and the tokens so far. What it does depends on them
alone, so a text that is resumed elsewhere or rolled back goes on as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from p2pinfer.errors import ConfigError

from .sampling_config import LogitsRules as LogitsRules

Processor: TypeAlias = Callable[
    [Tensor, Sequence[int]], None
]  # scores (vocab,), changed in place; ids so far


class Processors:
    """The rules as they apply to one text.

    Attributes:
        applies: False if no rule says anything, so that logits stay as they are.
    """

    def __init__(
        self,
        rules: LogitsRules,
        prompt_ids: Sequence[int],
        max_ids: int,
        eos_ids: Collection[int],
        grammar: Processor | None = None,
    ) -> None:
        """`max_ids` is how long the text may become, the prompt counted; `eos_ids` end it.

        A grammar has the last word, since no rule can make up for a text that does not follow it.
        """
        self._processors = _processors(rules, prompt_ids, max_ids, sorted(eos_ids))
        if grammar is not None:
            self._processors.append(grammar)
        self.applies = bool(self._processors)

    def __call__(self, logits: Tensor, ids: Sequence[int]) -> Tensor:
        """The logits to choose the next token from; those that came are left as they are.

        Args:
            logits: (vocab,) float32.
            ids: All tokens so far.

        Raises:
            ConfigError: Every token is forbidden.
        """
        if not self._processors:
            return logits
        scores = logits.clone()
        for process in self._processors:
            process(scores, ids)
        if scores.max() == -math.inf:
            raise ConfigError(
                f"after {len(ids)} tokens every next token is forbidden; "
                "relax bad_words_ids, suppress_tokens, logit_bias, no_repeat_ngram_size or the grammar"
            )
        return scores


def _processors(
    rules: LogitsRules, prompt_ids: Sequence[int], max_ids: int, eos_ids: Sequence[int]
) -> list[Processor]:
    """One for each rule that says anything, in transformers' order."""
    prompt_length = len(prompt_ids)
    made: list[Processor] = []
    if rules.sequence_bias:
        made.append(_bias(rules.sequence_bias))
    if rules.encoder_repetition_penalty != 1:
        made.append(_penalty(1 / rules.encoder_repetition_penalty, prompt_ids))
    if rules.repetition_penalty != 1:
        made.append(_penalty(rules.repetition_penalty))
    if rules.no_repeat_ngram_size:
        made.append(_no_repeat(rules.no_repeat_ngram_size))
    if rules.encoder_no_repeat_ngram_size:
        made.append(_no_repeat(rules.encoder_no_repeat_ngram_size, prompt_ids))
    # What ends the text may be forbidden as part of a sequence, but not by itself.
    bad = [words for words in rules.bad_words_ids if not (len(words) == 1 and words[0] in eos_ids)]
    if bad:
        made.append(_bias([(words, -math.inf) for words in bad]))
    least = prompt_length + rules.min_new_tokens if rules.min_new_tokens else rules.min_length
    if least > prompt_length:
        made.append(_forbid(eos_ids, lambda length: length < least))
    if rules.forced_bos_token_id is not None:
        made.append(_force((rules.forced_bos_token_id,), at=1))
    if rules.forced_eos_token_id:
        made.append(_force(rules.forced_eos_token_id, at=max_ids - 1))
    if rules.remove_invalid_values:
        made.append(_make_finite)
    if rules.exponential_decay_length_penalty is not None:
        start, factor = rules.exponential_decay_length_penalty
        made.append(_decay(start + prompt_length, factor, eos_ids))
    if rules.suppress_tokens:
        made.append(_forbid(rules.suppress_tokens, lambda _: True))
    if rules.begin_suppress_tokens:
        begin = prompt_length + (prompt_length == 1 and rules.forced_bos_token_id is not None)
        made.append(_forbid(rules.begin_suppress_tokens, lambda length: length == begin))
    return made


def _bias(biases: Sequence[tuple[Sequence[int], float]]) -> Processor:
    def process(scores: Tensor, ids: Sequence[int]) -> None:
        added = torch.zeros_like(scores)
        for (*before, last), bias in biases:
            if last < len(scores) and list(ids[len(ids) - len(before) :]) == before:
                added[last] += bias
        scores += added

    return process


def _penalty(penalty: float, over: Sequence[int] | None = None) -> Processor:
    """For the tokens of `over`, by default all so far (Keskar et al., 2019, section 4.1)."""

    def process(scores: Tensor, ids: Sequence[int]) -> None:
        seen = _known(set(ids if over is None else over), scores)
        score = scores[seen]
        scores[seen] = torch.where(score < 0, score * penalty, score / penalty)

    return process


def _no_repeat(size: int, over: Sequence[int] | None = None) -> Processor:
    """Forbids what would complete a run of `size` tokens that `over` has, by default all tokens so far."""

    def process(scores: Tensor, ids: Sequence[int]) -> None:
        if len(ids) < size:
            return
        text, prefix = tuple(ids if over is None else over), tuple(ids[len(ids) - size + 1 :])
        ends = range(size - 1, len(text))
        repeated = {text[end] for end in ends if text[end - size + 1 : end] == prefix}
        scores[_known(repeated, scores)] = -math.inf

    return process


def _forbid(token_ids: Collection[int], when: Callable[[int], bool]) -> Processor:
    def process(scores: Tensor, ids: Sequence[int]) -> None:
        if when(len(ids)):
            scores[_known(token_ids, scores)] = -math.inf

    return process


def _force(token_ids: Collection[int], *, at: int) -> Processor:
    def process(scores: Tensor, ids: Sequence[int]) -> None:
        if len(ids) == at:
            scores.fill_(-math.inf)[_known(token_ids, scores)] = 0.0

    return process


def _make_finite(scores: Tensor, ids: Sequence[int]) -> None:
    torch.nan_to_num_(scores, nan=0.0)


def _decay(start: int, factor: float, eos_ids: Collection[int]) -> Processor:
    def process(scores: Tensor, ids: Sequence[int]) -> None:
        if len(ids) > start:
            ends = _known(eos_ids, scores)
            gain = scores[ends].abs() * (pow(factor, len(ids) - start) - 1)
            scores[ends] += gain.masked_fill(~scores[ends].isfinite(), 0.0)

    return process


def _known(token_ids: Collection[int], scores: Tensor) -> Tensor:
    """Those of `token_ids` that the head gives a logit; a tokenizer may have more of them."""
    return torch.tensor([each for each in token_ids if 0 <= each < len(scores)], dtype=torch.long)
