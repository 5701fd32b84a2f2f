"""OpenAI's /v1/completions: a text is continued.

As https://platform.openai.com/docs/api-reference/completions, with vLLM's names for what OpenAI has none for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Final

from p2pinfer.api.answers import Asked
from p2pinfer.api.errors import ApiError
from p2pinfer.api.exchange import Answer, Plan
from p2pinfer.api.fields import Unhonoured, bounded, decode
from p2pinfer.api.served_model import ServedModel
from p2pinfer.api.token_texts import token_text, told_tokens
from p2pinfer.api.tool_calls import ToolCall
from p2pinfer.generation.generation import Token
from p2pinfer.models.text.text import Tokenizer

from .generation import OpenAIRequest, OpenAIShape
from .objects import HARMLESS, UNHONOURED

MAX_LOGPROBS: Final = 5
_MAX_TOKENS: Final = 16  # OpenAI's default
_KINDS: Final = ("text_completion", "text_completion")
_UNHONOURED: Final[Mapping[str, Unhonoured]] = {
    **UNHONOURED,
    "best_of": Unhonoured("every answer is returned; use n", (None, 1)),
    "suffix": Unhonoured("texts are continued, not filled in", (None, "")),
}


class CompletionRequest(OpenAIRequest):
    """A request to /v1/completions."""

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None


def plan_completion(body: bytes, model: ServedModel) -> Plan:
    """Understand a request.

    Raises:
        ApiError: It cannot be honoured.
    """
    said = decode(body, CompletionRequest, _UNHONOURED, HARMLESS)
    said.check(model)
    bounded(said.logprobs, "logprobs", 0, MAX_LOGPROBS)
    prompt = _prompt(said.prompt)
    if said.echo and said.logprobs is not None:
        raise ApiError("echo with logprobs is not supported: a prompt has no logprobs here", param="echo")
    limit = _MAX_TOKENS if said.max_tokens is None else said.max_tokens
    config = said.config(model.max_tokens(limit, "max_tokens"), said.logprobs)
    return Plan(
        Asked(prompt, config, said.choices),
        bool(said.stream),
        lambda tokenizer: CompletionShape(model.id, tokenizer, said, prompt if said.echo else ""),
    )


def _prompt(said: str | list[Any]) -> str:
    """The one text that is to be continued."""
    if isinstance(said, list) and len(said) == 1:
        (said,) = said
    if not isinstance(said, str):
        raise ApiError(
            "prompt must be one text; lists of texts or of tokens are not supported", param="prompt"
        )
    return said


class CompletionShape(OpenAIShape):
    """Answers as `text_completion` objects."""

    def __init__(self, model: str, tokenizer: Tokenizer, said: CompletionRequest, echoed: str) -> None:
        options = {"has_logprobs": said.logprobs is not None, "wants_usage": said.wants_usage}
        super().__init__(_KINDS, "cmpl", model, tokenizer, said.choices, **options)
        self._echoed = echoed
        self._lengths = [0] * said.choices  # of the texts so far, for the offsets of tokens

    def _begin(self, index: int) -> bytes:
        return self._event(index, {"text": self._echoed, "logprobs": None}) if self._echoed else b""

    def _part(
        self, index: int, text: str, tokens: Sequence[Token], calls: Sequence[ToolCall] = ()
    ) -> Mapping[str, Any]:
        logprobs = self._told_logprobs(tokens, self._lengths[index])
        self._lengths[index] += len(text)
        return {"text": text, "logprobs": logprobs}

    def _choice(self, answer: Answer) -> Mapping[str, Any]:
        return {
            "text": self._echoed + answer.result.text,
            "logprobs": self._told_logprobs(answer.tokens, 0),
        }

    def _told_logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        told = told_tokens(self._tokenizer, tokens)
        texts = [token_text(self._tokenizer, token_id)[0] for token_id, _ in told]
        return {
            "tokens": texts,
            "token_logprobs": [logs.token for _, logs in told],
            "top_logprobs": [
                {token_text(self._tokenizer, other)[0]: value for other, value in logs.likeliest}
                for _, logs in told
            ],
            "text_offset": list(accumulate(map(len, texts[:-1]), initial=offset))[: len(texts)],
        }
