"""OpenAI's /v1/chat/completions: a conversation is answered.

As https://platform.openai.com/docs/api-reference/chat, with vLLM's names for what OpenAI has none for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal

import msgspec

from p2pinfer.api.answers import Asked
from p2pinfer.api.errors import ApiError
from p2pinfer.api.exchange import Answer, Plan
from p2pinfer.api.fields import Unhonoured, bounded, decode
from p2pinfer.api.formats import form_of
from p2pinfer.api.served_model import ServedModel
from p2pinfer.api.token_texts import LEAST_LOGPROB, token_text, told_tokens
from p2pinfer.api.tool_calls import ToolCall
from p2pinfer.generation.generation import Token
from p2pinfer.models.text.text import Tokenizer

from .generation import OpenAIRequest, OpenAIShape
from .objects import HARMLESS, UNHONOURED

MAX_TOP_LOGPROBS: Final = 20
_OLD_TOOLS: Final = "give tools and tool_choice instead"
_UNHONOURED: Final[Mapping[str, Unhonoured]] = {
    **UNHONOURED,
    "functions": Unhonoured(_OLD_TOOLS, (None, [])),
    "function_call": Unhonoured(_OLD_TOOLS, (None, "none", "auto")),
    "modalities": Unhonoured("answers are text", (None, ["text"])),
    "audio": Unhonoured("answers are text"),
    "prediction": Unhonoured("guesses come from the text itself"),
    "reasoning_effort": Unhonoured("set what the model's template knows in chat_template_kwargs"),
    "verbosity": Unhonoured("say it in the messages", (None, "medium")),
    "web_search_options": Unhonoured("nothing is searched"),
}
_OWN_VARIABLES: Final = frozenset(("self", "messages", "tools", "add_generation_prompt"))  # of a template


class _Part(msgspec.Struct):
    """Part of a message's content."""

    type: str
    text: str | None = None


class _CalledFunction(msgspec.Struct):
    name: str
    arguments: str


class _Call(msgspec.Struct):
    function: _CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[_Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    refusal: str | None = None  # these three are null in answers that clients send back
    audio: Any = None
    annotations: list[Any] | None = None


class ChatRequest(OpenAIRequest):
    """A request to /v1/chat/completions."""

    messages: list[_Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def plan_chat(body: bytes, model: ServedModel) -> Plan:
    """Understand a request.

    Raises:
        ApiError: It cannot be honoured.
    """
    said = decode(body, ChatRequest, _UNHONOURED, HARMLESS)
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
    forced = said.tool_choice not in (None, "auto", "none")
    toolbox = model.toolbox(_tools(said), single=said.parallel_tool_calls is False)
    name = _forced(said.tool_choice) if forced else None
    form = form_of(config.grammar, toolbox, "response_format", forced=forced, name=name)
    config = replace(config, grammar=form)
    messages = conversation(said.messages, model)
    return Plan(
        Asked(messages, config, said.choices, said.chat_template_kwargs, toolbox),
        bool(said.stream),
        partial(ChatShape, model.id, said),
    )


def _tools(said: ChatRequest) -> Sequence[dict[str, Any]]:
    """Tools that the model is told of."""
    if said.tool_choice not in (None, "auto", "none") and not said.tools:
        raise ApiError("tool_choice asks for a call, and there are no tools", param="tool_choice")
    return () if said.tool_choice == "none" else said.tools or ()


def _forced(choice: str | dict[str, Any] | None) -> str | None:
    """Name of the tool that has to be called; None if it may be any."""
    match choice:
        case "required":
            return None
        case {"type": "function", "function": {"name": str(name)}}:
            return name
        case _:
            raise ApiError("tool_choice must be auto, none, required or a function", param="tool_choice")


def conversation(messages: Sequence[_Message], model: ServedModel) -> tuple[dict[str, Any], ...]:
    """Messages as templates know them: content is one text, and arguments of calls are objects.

    Raises:
        ApiError: One cannot be told to the model.
    """
    called = {call.id: call.function.name for each in messages for call in each.tool_calls or ()}
    return tuple(_as_told(message, model, called) for message in messages)


def _as_told(message: _Message, model: ServedModel, called: Mapping[str | None, str]) -> dict[str, Any]:
    if message.function_call or message.role == "function":
        raise ApiError(f"a message is of a function; {_OLD_TOOLS}", param="messages")
    if (message.tool_calls or message.role == "tool") and not model.takes_tools:
        raise ApiError(
            "a message is of a tool, and tools are not supported: this model takes none", param="messages"
        )
    if message.audio or message.annotations:
        raise ApiError("a message has audio or annotations; only text is supported", param="messages")
    told: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": text_of(message.content) if message.content is not None else message.refusal or "",
    }
    name = message.name or (called.get(message.tool_call_id) if message.role == "tool" else None)
    for key, value in (
        ("name", name),
        ("tool_call_id", message.tool_call_id),
        ("reasoning_content", message.reasoning_content),
    ):
        if value is not None:
            told[key] = value
    if message.tool_calls:
        told["tool_calls"] = [_call_as_told(call) for call in message.tool_calls]
    return told


def _call_as_told(call: _Call) -> dict[str, Any]:
    try:
        arguments: object = msgspec.json.decode(call.function.arguments or "{}")
    except (msgspec.DecodeError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError("a message has a tool call whose arguments are no JSON object", param="messages")
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


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


def _as_called(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments_json},
    }


class ChatShape(OpenAIShape):
    """Answers as `chat.completion` and `chat.completion.chunk` objects."""

    def __init__(self, model: str, said: ChatRequest, tokenizer: Tokenizer) -> None:
        kinds = ("chat.completion", "chat.completion.chunk")
        options = {"has_logprobs": bool(said.logprobs), "wants_usage": said.wants_usage}
        super().__init__(kinds, "chatcmpl", model, tokenizer, said.choices, **options)
        self._calls = [0] * said.choices  # told so far

    def _begin(self, index: int) -> bytes:
        return self._event(index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None})

    def _part(
        self, index: int, text: str, tokens: Sequence[Token], calls: Sequence[ToolCall] = ()
    ) -> Mapping[str, Any]:
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            first = self._calls[index]
            self._calls[index] += len(calls)
            delta["tool_calls"] = [
                {"index": number, **_as_called(call)} for number, call in enumerate(calls, first)
            ]
        return {"delta": delta, "logprobs": self._told_logprobs(tokens)}

    def _choice(self, answer: Answer) -> Mapping[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            calls = [_as_called(call) for call in answer.calls]
            message |= {"content": answer.text or None, "tool_calls": calls}
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
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": written}
