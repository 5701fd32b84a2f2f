"""OpenAI's /v1/completions: a text is continued.

As https://platform.openai.com/docs/api-reference/completions, with vLLM's names for what OpenAI has none for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Final

import msgspec

from p2pinfer.client_config import GenerationConfig
from p2pinfer.generation.generation import GenerationResult, Token
from p2pinfer.models.text.text import Tokenizer

from .answers import Asked, Begun, Ended, Event, Piece, check_choices
from .errors import ApiError
from .exchange import Answer, Plan, report
from .fields import Unhonoured, bounded, decode, stops
from .openai_chat import StreamOptions
from .openai_objects import (
    DONE,
    FINISH,
    HARMLESS,
    MAX_STOPS,
    PING,
    SSE,
    UNHONOURED,
    error_body,
    event,
    logit_bias,
    new_id,
    token_text,
    told_tokens,
    usage,
)
from .served_model import ServedModel

MAX_LOGPROBS: Final = 5
_MAX_TOKENS: Final = 16  # OpenAI's default
_UNHONOURED: Final[Mapping[str, Unhonoured]] = {
    **UNHONOURED,
    "best_of": Unhonoured("every answer is returned; use n", (None, 1)),
    "suffix": Unhonoured("texts are continued, not filled in", (None, "")),
}


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    prompt: str | list[Any]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    echo: bool | None = None


def plan_completion(body: bytes, model: ServedModel) -> Plan:
    """Understand a request.

    Raises:
        ApiError: It cannot be honoured.
    """
    said = decode(body, _Request, _UNHONOURED, HARMLESS)
    model.check(said.model)
    choices = 1 if said.n is None else said.n
    check_choices(choices, model.config.max_choices, "n")
    bounded(said.logprobs, "logprobs", 0, MAX_LOGPROBS)
    bounded(said.temperature, "temperature", 0, 2)
    prompt = _prompt(said.prompt)
    if said.echo and said.logprobs is not None:
        raise ApiError("echo with logprobs is not supported: a prompt has no logprobs here", param="echo")
    config = GenerationConfig(
        max_new_tokens=model.max_tokens(
            _MAX_TOKENS if said.max_tokens is None else said.max_tokens, "max_tokens"
        ),
        temperature=said.temperature,
        top_p=said.top_p,
        top_k=said.top_k,
        min_p=said.min_p,
        seed=said.seed,
        repetition_penalty=said.repetition_penalty,
        logit_bias=logit_bias(said.logit_bias),
        stop=stops(said.stop, MAX_STOPS),
        logprobs=said.logprobs,
    )
    wants_usage = bool(said.stream_options and said.stream_options.include_usage)
    echoed = prompt if said.echo else ""
    return Plan(
        Asked(prompt, config, choices),
        bool(said.stream),
        lambda tokenizer: CompletionShape(
            model.id, tokenizer, choices, config.logprobs, echoed, wants_usage=wants_usage
        ),
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


class CompletionShape:
    """Answers as `text_completion` objects."""

    content_type = SSE
    ping = PING

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        choices: int,
        logprobs: int | None,
        echoed: str,
        *,
        wants_usage: bool,
    ) -> None:
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._echoed = echoed
        self._wants_usage = wants_usage
        self._waiting: list[list[Token]] = [[] for _ in range(choices)]  # for text that they are part of
        self._lengths = [0] * choices  # of the texts so far, for the offsets of tokens
        self._results: dict[int, GenerationResult] = {}
        self._choices = choices

    def chunk(self, said: Event) -> bytes:
        """See `Shape`."""
        match said:
            case Begun():
                return self._event(said.index, self._echoed) if self._echoed else b""
            case Piece():
                return self._piece(said)
            case Ended():
                return self._end(said)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """See `Shape`."""
        results = [answer.result for answer in answers]
        choices = [
            {
                "index": index,
                "text": self._echoed + answer.result.text,
                "logprobs": self._told_logprobs(answer.tokens, 0),
                "finish_reason": FINISH[answer.result.finish_reason],
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._head, "choices": choices, "usage": usage(results), "p2pinfer": report(results[0])}

    def failed(self, error: ApiError) -> bytes:
        """See `Shape`."""
        return event(error_body(error))

    def _piece(self, said: Piece) -> bytes:
        index, text = said.index, said.token.text
        if self._logprobs is not None:
            self._waiting[index].append(said.token)
        if not text:
            return b""
        logprobs = self._told_logprobs(self._waiting[index], self._lengths[index])
        self._waiting[index] = []
        self._lengths[index] += len(text)
        return self._event(index, text, logprobs=logprobs)

    def _end(self, said: Ended) -> bytes:
        self._results[said.index] = said.result
        own = {"p2pinfer": report(said.result)}
        told = self._event(said.index, "", finish_reason=FINISH[said.result.finish_reason], **own)
        if len(self._results) < self._choices:
            return told
        if self._wants_usage:
            told += event({**self._head, "choices": [], "usage": usage(list(self._results.values()))})
        return told + DONE

    def _event(
        self, index: int, text: str, *, logprobs: Any = None, finish_reason: str | None = None, **own: Any
    ) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return event({**self._head, "choices": [choice], **own})

    def _told_logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        if self._logprobs is None:
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
