"""Settings of sampling: rules that change the logits, and parameters of the draw.

Imports no torch, so that a mistake in a setting is told at once.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Final

from p2pinfer.errors import ConfigError

MAX_GRAMMAR_CHARS: Final = 256 << 10


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """Settings of the choice of tokens; the defaults are greedy."""

    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # keep the likeliest tokens that make up this share; 1 keeps all
    top_k: int = 0  # keep this many; 0 keeps all
    seed: int | None = None  # None draws a fresh one
    min_p: float = 0.0  # keep what is at least this part as likely as the likeliest; 0 keeps all
    typical_p: float = 1.0  # keep the most typical tokens that make up this share; 1 keeps all
    top_h: float = 0.0  # keep the likeliest tokens that make up this share of the entropy; 0 keeps all
    epsilon_cutoff: float = 0.0  # keep what is at least so likely; 0 keeps all
    eta_cutoff: float = 0.0  # the same, less strict where the entropy is high; 0 keeps all

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        for name in ("top_p", "typical_p"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0 and at most 1")
        for name in ("min_p", "top_h"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be from 0 (all) to 1")
        for name in ("epsilon_cutoff", "eta_cutoff"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 (all) or more, below 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (all) or more")

    @property
    def seed_or_fresh(self) -> int:
        """The seed; one that is drawn now where there is none."""
        return secrets.randbits(63) if self.seed is None else self.seed


@dataclass(frozen=True, slots=True)
class LogitsRules:
    """Rules that change logits, by transformers' names; the defaults change nothing."""

    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()  # for the last token of each sequence
    encoder_repetition_penalty: float = 1.0  # above 1 favours tokens of the prompt
    repetition_penalty: float = 1.0  # above 1 disfavours tokens that occur, in prompt or text
    no_repeat_ngram_size: int = 0  # no run of so many tokens comes twice; 0: any may
    encoder_no_repeat_ngram_size: int = 0  # no run of so many tokens is the prompt's; 0: any may be
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # sequences that never become complete
    min_length: int = 0  # tokens, the prompt counted, before which the text does not end
    min_new_tokens: int = 0  # the same without the prompt; if given, `min_length` does not count
    forced_bos_token_id: int | None = None  # what follows a prompt of one token
    forced_eos_token_id: tuple[int, ...] = ()  # what the last token that was asked for is
    remove_invalid_values: bool = False  # infinite logits become finite ones, and what is no number 0
    # from so many new tokens on, by so much
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()  # never
    begin_suppress_tokens: tuple[int, ...] = ()  # never as the first token after the prompt

    def __post_init__(self) -> None:
        for name in ("repetition_penalty", "encoder_repetition_penalty"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; it must be above 0, and 1 changes nothing"
                )
        for name in ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for ids, bias in self.sequence_bias:
            if not ids or math.isnan(bias) or bias == math.inf:
                raise ConfigError(f"a bias of {bias} for the tokens {list(ids)} makes no sense")


def needs_ids(rules: LogitsRules) -> str:
    """Name of a rule that looks at the tokens of the text, and not only at their number; empty: none does."""
    by_tokens = {
        "encoder_repetition_penalty": rules.encoder_repetition_penalty != 1,
        "repetition_penalty": rules.repetition_penalty != 1,
        "no_repeat_ngram_size": rules.no_repeat_ngram_size > 0,
        "encoder_no_repeat_ngram_size": rules.encoder_no_repeat_ngram_size > 0,
        "sequence_bias": any(len(ids) > 1 for ids, _ in rules.sequence_bias),
        "bad_words_ids": any(len(ids) > 1 for ids in rules.bad_words_ids),
    }
    return next((name for name, looks in by_tokens.items() if looks), "")
