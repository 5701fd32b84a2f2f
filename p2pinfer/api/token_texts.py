"""Texts of single tokens, as dialects tell them beside log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from p2pinfer.generation.generation import Token
from p2pinfer.models.text.log_probabilities import LogProbabilities
from p2pinfer.models.text.text import Tokenizer

LEAST_LOGPROB: Final = -9999.0  # OpenAI's word for tokens that cannot be; JSON has no infinity


def token_text(tokenizer: Tokenizer, token_id: int) -> tuple[str, list[int]]:
    """Text and bytes of one token, which need not be whole characters."""
    if token_id in tokenizer.special_texts:
        text = tokenizer.special_texts[token_id]
        return text, list(text.encode())
    written = tokenizer.token_bytes(token_id)
    return written.decode("utf-8", "replace"), list(written)


def told_tokens(tokenizer: Tokenizer, tokens: Sequence[Token]) -> list[tuple[int, LogProbabilities]]:
    """Tokens that are part of the text, with their log probabilities."""
    return [
        (token.id, token.log_probabilities)
        for token in tokens
        if token.log_probabilities is not None and token.id not in tokenizer.special_texts
    ]
