"""OpenAI's /v1/chat/completions: a conversation is answered.

As https://platform.openai.com/docs/api-reference/chat, with vLLM's names for what OpenAI has none for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal

import msgspec

from p2pinfer.generation.generation import Token
from p2pinfer.models.text.text import Tokenizer

from .answers import Asked
from .errors import ApiError
from .exchange import Answer, Plan
from .fields import Unhonoured, bounded, decode
from .openai_generation import OpenAIRequest, OpenAIShape
from .openai_objects import HARMLESS, UNHONOURED, token_text, told_tokens
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
_OWN_VARIABLES: Final = frozenset(("self", "messages", "tools", "add_generation_prompt"))  # of a template
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


class _Request(OpenAIRequest):
    messages: list[_Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def plan_chat(body: bytes, model: ServedModel) -> Plan:
    """Understand a request.

    Raises:
        ApiError: It cannot be honoured.
    """
    said = decode(body, _Request, _UNHONOURED, _HARMLESS)
    said.check(model)
    if not said.messages:
        raise ApiError("messages is empty", param="messages")
    if said.top_logprobs is not None and not said.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
    bounded(said.top_logprobs, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if taken := _OWN_VARIABLES.intersection(said.chat_template_kwargs or ()):
        raise ApiError(f"{min(taken)} is set by the request itself", param="chat_template_kwargs")
    limit = said.max_completion_tokens if said.max_completion_tokens is not None else said.max_tokens
    config = said.config(
        model.max_tokens(limit, "max_tokens"), (said.top_logprobs or 0) if said.logprobs else None
    )
    messages = tuple(_as_told(message) for message in said.messages)
    return Plan(
        Asked(messages, config, said.choices, said.chat_template_kwargs),
        bool(said.stream),
        partial(_shape, model.id, said),
    )


def _shape(model: str, said: _Request, tokenizer: Tokenizer) -> ChatShape:
    kinds = ("chat.completion", "chat.completion.chunk")
    options = {"has_logprobs": bool(said.logprobs), "wants_usage": said.wants_usage}
    return ChatShape(kinds, "chatcmpl", model, tokenizer, said.choices, **options)


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


class ChatShape(OpenAIShape):
    """Answers as `chat.completion` and `chat.completion.chunk` objects."""

    def _begin(self, index: int) -> bytes:
        return self._event(index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None})

    def _part(self, index: int, text: str, tokens: Sequence[Token]) -> Mapping[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": self._told_logprobs(tokens)}

    def _choice(self, answer: Answer) -> Mapping[str, Any]:
        message = {"role": "assistant", "content": answer.result.text, "refusal": None}
        return {"message": message, "logprobs": self._told_logprobs(answer.tokens)}

    def _told_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._has_logprobs:
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
