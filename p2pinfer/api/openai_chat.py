"""OpenAI's /v1/chat/completions: a conversation is answered.

As https://platform.openai.com/docs/api-reference/chat, with vLLM's names for what OpenAI has none for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from p2pinfer.client_config import GenerationConfig
from p2pinfer.generation.generation import GenerationResult, Token
from p2pinfer.models.text.text import Tokenizer

from .answers import Asked, Begun, Ended, Event, Piece, check_choices
from .errors import ApiError
from .exchange import Answer, Plan, report
from .fields import Unhonoured, bounded, decode, stops
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

MAX_TOP_LOGPROBS: Final = 20
_NO_TOOLS: Final = "models are not given tools here"
_UNHONOURED: Final[Mapping[str, Unhonoured]] = {
    **UNHONOURED,
    "tools": Unhonoured(_NO_TOOLS, (None, [])),
    "tool_choice": Unhonoured(_NO_TOOLS, (None, "none", "auto")),
    "functions": Unhonoured(_NO_TOOLS, (None, [])),
    "function_call": Unhonoured(_NO_TOOLS, (None, "none", "auto")),
    "modalities": Unhonoured("answers are text", (None, ["text"])),
    "audio": Unhonoured("answers are text"),
    "prediction": Unhonoured("guesses come from the text itself"),
    "reasoning_effort": Unhonoured("set what the model's template knows in chat_template_kwargs"),
    "verbosity": Unhonoured("say it in the messages", (None, "medium")),
    "web_search_options": Unhonoured("nothing is searched"),
}
_HARMLESS: Final = HARMLESS | {"parallel_tool_calls"}


class _Part(msgspec.Struct):
    """Part of a message's content."""

    type: str
    text: str | None = None


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[_Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    refusal: str | None = None  # these three are null in answers that clients send back
    audio: Any = None
    annotations: list[Any] | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Options of a stream. `include_obfuscation` pads the lengths of events, which changes no answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    messages: list[_Message]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def plan_chat(body: bytes, model: ServedModel) -> Plan:
    """Understand a request.

    Raises:
        ApiError: It cannot be honoured.
    """
    said = decode(body, _Request, _UNHONOURED, _HARMLESS)
    model.check(said.model)
    choices = 1 if said.n is None else said.n
    check_choices(choices, model.config.max_choices, "n")
    if not said.messages:
        raise ApiError("messages is empty", param="messages")
    if said.top_logprobs is not None and not said.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
    bounded(said.top_logprobs, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    bounded(said.temperature, "temperature", 0, 2)
    limit = said.max_completion_tokens if said.max_completion_tokens is not None else said.max_tokens
    config = GenerationConfig(
        max_new_tokens=model.max_tokens(limit, "max_tokens"),
        temperature=said.temperature,
        top_p=said.top_p,
        top_k=said.top_k,
        min_p=said.min_p,
        seed=said.seed,
        repetition_penalty=said.repetition_penalty,
        logit_bias=logit_bias(said.logit_bias),
        stop=stops(said.stop, MAX_STOPS),
        logprobs=(said.top_logprobs or 0) if said.logprobs else None,
    )
    messages = tuple(_as_told(message) for message in said.messages)
    wants_usage = bool(said.stream_options and said.stream_options.include_usage)
    return Plan(
        Asked(messages, config, choices, said.chat_template_kwargs),
        bool(said.stream),
        lambda tokenizer: ChatShape(model.id, tokenizer, choices, config.logprobs, wants_usage=wants_usage),
    )


def _as_told(message: _Message) -> dict[str, Any]:
    """A message as templates know it: its content is one text."""
    if message.tool_calls or message.function_call or message.role in ("tool", "function"):
        raise ApiError(f"a message is of a tool, and {_NO_TOOLS}", param="messages")
    if message.audio or message.annotations:
        raise ApiError("a message has audio or annotations; only text is supported", param="messages")
    told: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": text_of(message.content) if message.content is not None else message.refusal or "",
    }
    if message.name is not None:
        told["name"] = message.name
    if message.reasoning_content is not None:
        told["reasoning_content"] = message.reasoning_content
    return told


def text_of(content: str | Sequence[_Part]) -> str:
    """Text of a message's content.

    Raises:
        ApiError: A part of it is no text.
    """
    if isinstance(content, str):
        return content
    for part in content:
        if part.type != "text" or part.text is None:
            raise ApiError(
                f"content of type {part.type[:50]!r} is not supported: the model takes text", param="messages"
            )
    return "".join(part.text or "" for part in content)


class ChatShape:
    """Answers as `chat.completion` and `chat.completion.chunk` objects."""

    content_type = SSE
    ping = PING

    def __init__(
        self, model: str, tokenizer: Tokenizer, choices: int, logprobs: int | None, *, wants_usage: bool
    ) -> None:
        self._head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._wants_usage = wants_usage
        self._waiting: list[list[Token]] = [[] for _ in range(choices)]  # for text that they are part of
        self._results: dict[int, GenerationResult] = {}
        self._choices = choices

    def chunk(self, said: Event) -> bytes:
        """See `Shape`."""
        match said:
            case Begun():
                return self._event(said.index, {"role": "assistant", "content": ""})
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
                "message": {"role": "assistant", "content": answer.result.text, "refusal": None},
                "logprobs": self._told_logprobs(answer.tokens),
                "finish_reason": FINISH[answer.result.finish_reason],
            }
            for index, answer in enumerate(answers)
        ]
        told = {"choices": choices, "usage": usage(results), "p2pinfer": report(results[0])}
        return {**self._head, "object": "chat.completion", **told}

    def failed(self, error: ApiError) -> bytes:
        """See `Shape`."""
        return event(error_body(error))

    def _piece(self, said: Piece) -> bytes:
        if self._logprobs is not None:
            self._waiting[said.index].append(said.token)
        if not said.token.text:
            return b""
        logprobs = self._told_logprobs(self._waiting[said.index])
        self._waiting[said.index] = []
        return self._event(said.index, {"content": said.token.text}, logprobs=logprobs)

    def _end(self, said: Ended) -> bytes:
        self._results[said.index] = said.result
        own = {"p2pinfer": report(said.result)}
        told = self._event(said.index, {}, finish_reason=FINISH[said.result.finish_reason], **own)
        if len(self._results) < self._choices:
            return told
        if self._wants_usage:
            results = list(self._results.values())
            told += event({**self._chunk_head, "choices": [], "usage": usage(results)})
        return told + DONE

    @property
    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"}

    def _event(
        self,
        index: int,
        delta: Mapping[str, Any],
        *,
        logprobs: Any = None,
        finish_reason: str | None = None,
        **own: Any,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return event({**self._chunk_head, "choices": [choice], **own})

    def _told_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        told = told_tokens(self._tokenizer, tokens)
        content = [
            {
                **self._entry(token_id, logs.token),
                "top_logprobs": [self._entry(other, value) for other, value in logs.likeliest],
            }
            for token_id, logs in told
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, written = token_text(self._tokenizer, token_id)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": written}
