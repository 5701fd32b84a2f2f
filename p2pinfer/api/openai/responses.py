"""OpenAI's /v1/responses, stateless: a conversation that is sent whole is answered, and nothing is kept.

As https://www.openresponses.org and https://platform.openai.com/docs/api-reference/responses.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal

import msgspec

from p2pinfer.api.answers import Asked, Begun, Ended, Event, Piece
from p2pinfer.api.errors import ApiError
from p2pinfer.api.exchange import Answer, Plan, encode, report
from p2pinfer.api.fields import Unhonoured, bounded, decode
from p2pinfer.api.formats import any_object, form_of, schema_grammar
from p2pinfer.api.served_model import ServedModel
from p2pinfer.api.tool_calls import ToolCall
from p2pinfer.audit.tally import AuditTally
from p2pinfer.client_config import GenerationConfig
from p2pinfer.generation.generation import GenerationResult
from p2pinfer.models.text.text import Tokenizer

from .objects import HARMLESS, SSE, error_body, new_id

_NOT_KEPT: Final = "nothing is kept; send the whole conversation as input"
_UNHONOURED: Final[Mapping[str, Unhonoured]] = {
    "previous_response_id": Unhonoured(_NOT_KEPT),
    "conversation": Unhonoured(_NOT_KEPT),
    "store": Unhonoured(_NOT_KEPT, (None, False)),
    "background": Unhonoured(_NOT_KEPT, (None, False)),
    "prompt": Unhonoured("there are no prompts here; send the text"),
    "include": Unhonoured("answers are whole", (None, [])),
    "truncation": Unhonoured("a prompt that is too long is refused", (None, "disabled")),
    "service_tier": Unhonoured("there is one", (None, "auto", "default")),
    "max_tool_calls": Unhonoured("the server calls no tools"),
    "top_logprobs": Unhonoured("ask /v1/chat/completions for them", (None, 0)),
    "reasoning": Unhonoured("the model's template has no such switch here", (None, {})),
}


class _Part(msgspec.Struct):
    """Part of an item's content."""

    type: str
    text: str | None = None


class _Item(msgspec.Struct):
    """An item of the input, of any type."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] = "user"
    content: str | list[_Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[_Part] | None = None


class _Format(msgspec.Struct):
    type: str = "text"
    schema: Any = None


class _Text(msgspec.Struct, forbid_unknown_fields=True):
    format: _Format | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A request to /v1/responses."""

    model: str
    input: str | list[_Item]
    instructions: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: _Text | None = None


def plan_response(body: bytes, model: ServedModel) -> Plan:
    """Understand a request.

    Raises:
        ApiError: It cannot be honoured.
    """
    said = decode(body, ResponsesRequest, _UNHONOURED, HARMLESS)
    model.check(said.model)
    bounded(said.temperature, "temperature", 0, 2)
    schemas = [] if said.tool_choice == "none" else [_schema(tool) for tool in said.tools or ()]
    forced = said.tool_choice not in (None, "auto", "none")
    toolbox = model.toolbox(schemas, single=said.parallel_tool_calls is False)
    name: str | None = None
    match said.tool_choice:
        case None | "auto" | "none":
            pass
        case "required" if toolbox is not None:
            pass
        case {"type": "function", "name": str() as asked_name} if toolbox is not None:
            name = asked_name
        case _:
            raise ApiError(
                "tool_choice must be auto, none, required or a function, of the tools that are given",
                param="tool_choice",
            )
    own = _grammar(said.text.format if said.text else None)
    config = GenerationConfig(
        max_new_tokens=model.max_tokens(said.max_output_tokens, "max_output_tokens"),
        temperature=said.temperature,
        top_p=said.top_p,
        grammar=form_of(own, toolbox, "text.format", forced=forced, name=name),
    )
    asked = Asked(_conversation(said, model), config, toolbox=toolbox)
    return Plan(asked, bool(said.stream), partial(ResponseShape, model.id, said))


def _schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as templates know it: here a function's fields are the tool's own."""
    function = {name: value for name, value in tool.items() if name != "type"}
    return {"type": tool.get("type"), "function": function}


def _grammar(said: _Format | None) -> str | None:
    match said:
        case None | _Format(type="text"):
            return None
        case _Format(type="json_object"):
            return any_object()
        case _Format(type="json_schema"):
            return schema_grammar(said.schema, "text.format.schema")
        case _:
            raise ApiError("text.format must be of type text, json_object or json_schema", param="text")


def _conversation(said: ResponsesRequest, model: ServedModel) -> tuple[dict[str, Any], ...]:
    """The input as templates know it."""
    told: list[dict[str, Any]] = []
    if said.instructions:
        told.append({"role": "system", "content": said.instructions})
    items = [_Item(content=said.input)] if isinstance(said.input, str) else said.input
    if not items:
        raise ApiError("input is empty", param="input")
    called: dict[str | None, str | None] = {}
    for item in items:
        if item.type.startswith("function_call") and not model.takes_tools:
            raise ApiError(
                "an item is of a tool, and tools are not supported: this model takes none", param="input"
            )
        match item.type:
            case "message":
                role = "system" if item.role == "developer" else item.role
                told.append({"role": role, "content": _text(item.content)})
            case "function_call":
                called[item.call_id] = item.name
                if not told or told[-1]["role"] != "assistant":
                    told.append({"role": "assistant", "content": ""})
                told[-1].setdefault("tool_calls", []).append(_call(item))
            case "function_call_output":
                result = {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
                name = called.get(item.call_id)
                told.append(result if name is None else {**result, "name": name})
            case _:
                raise ApiError(f"input of type {item.type[:50]!r} is not supported", param="input")
    return tuple(told)


def _call(item: _Item) -> dict[str, Any]:
    try:
        arguments: object = msgspec.json.decode(item.arguments or "{}")
    except (msgspec.DecodeError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError("a function_call has arguments that are no JSON object", param="input")
    function: dict[str, Any] = {"name": item.name, "arguments": arguments}
    return {"id": item.call_id, "type": "function", "function": function}


def _text(content: str | Sequence[_Part] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("input_text", "output_text", "text") or part.text is None:
            raise ApiError(
                f"content of type {part.type[:50]!r} is not supported: the model takes text", param="input"
            )
    return "".join(part.text or "" for part in content)


class ResponseShape:
    """Answers as `response` objects and events of them."""

    content_type = SSE
    ping = b": ping\n\n"

    def __init__(self, model: str, said: ResponsesRequest, _: Tokenizer) -> None:
        self._head: dict[str, Any] = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": said.instructions,
            "max_output_tokens": said.max_output_tokens,
            "temperature": said.temperature,
            "top_p": said.top_p,
            "tools": said.tools or [],
            "tool_choice": said.tool_choice or "auto",
            "parallel_tool_calls": said.parallel_tool_calls is not False,
            "text": {"format": (said.text.format if said.text else None) or {"type": "text"}},
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "metadata": {},
            "error": None,
            "incomplete_details": None,
        }
        self._output: list[dict[str, Any]] = []
        self._said: str | None = None  # by the message that is being written
        self._number = 0  # of the next event

    def chunk(self, said: Event) -> bytes:
        """See `Shape`."""
        match said:
            case Begun():
                begun: dict[str, Any] = {
                    "response": {**self._head, "status": "in_progress", "output": [], "usage": None}
                }
                return self._event("response.created", begun) + self._event("response.in_progress", begun)
            case Piece():
                return self._write(said.text) + b"".join(map(self._add_call, said.calls))
            case Ended():
                return self._end_message() + self._close(said.result, said.audits)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """See `Shape`."""
        (answer,) = answers
        output = [_message(new_id("msg"), answer.text, "completed")] if answer.text else []
        output += [_called(call, call.arguments_json, "completed") for call in answer.calls]
        return self._ended(answer.result, answer.audits, output)

    def failed(self, error: ApiError) -> bytes:
        """See `Shape`."""
        told = error_body(error)["error"]
        failure = {"code": told["code"] or told["type"], "message": told["message"]}
        response = {**self._head, "status": "failed", "error": failure, "output": self._output, "usage": None}
        return self._event("response.failed", {"response": response})

    def _close(self, result: GenerationResult, audits: AuditTally) -> bytes:
        ended = self._ended(result, audits, self._output)
        return self._event(f"response.{ended['status']}", {"response": ended})

    def _ended(
        self, result: GenerationResult, audits: AuditTally, output: list[dict[str, Any]]
    ) -> dict[str, Any]:
        cut = result.finish_reason == "length"
        given, count = result.prompt_tokens, len(result.token_ids)
        return {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": output,
            "usage": {
                "input_tokens": given,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": count,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": given + count,
            },
            "p2pinfer": report(result, audits),
        }

    def _write(self, text: str) -> bytes:
        if not text:
            return b""
        told = b""
        if self._said is None:
            self._said = ""
            item: dict[str, Any] = {**_message(new_id("msg"), "", "in_progress"), "content": []}
            self._output.append(item)
            told = self._event("response.output_item.added", {**self._place(), "item": item})
            told += self._event("response.content_part.added", {**self._part(), "part": _part("")})
        self._said += text
        return told + self._event(
            "response.output_text.delta", {**self._part(), "delta": text, "logprobs": []}
        )

    def _end_message(self) -> bytes:
        if self._said is None:
            return b""
        text, self._said = self._said, None
        item = self._output[-1] = _message(self._output[-1]["id"], text, "completed")
        told = self._event("response.output_text.done", {**self._part(), "text": text, "logprobs": []})
        told += self._event("response.content_part.done", {**self._part(), "part": _part(text)})
        return told + self._event("response.output_item.done", {**self._place(), "item": item})

    def _add_call(self, call: ToolCall) -> bytes:
        told = self._end_message()
        written = call.arguments_json
        item = _called(call, "", "in_progress")
        self._output.append({**item, "arguments": written, "status": "completed"})
        place = {**self._place(), "item_id": item["id"]}
        told += self._event("response.output_item.added", {**self._place(), "item": item})
        told += self._event("response.function_call_arguments.delta", {**place, "delta": written})
        done = {**place, "name": call.name, "arguments": written}
        told += self._event("response.function_call_arguments.done", done)
        return told + self._event("response.output_item.done", {**self._place(), "item": self._output[-1]})

    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self._output) - 1}

    def _part(self) -> dict[str, Any]:
        return {**self._place(), "item_id": self._output[-1]["id"], "content_index": 0}

    def _event(self, kind: str, fields: Mapping[str, Any]) -> bytes:
        document = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: ".encode() + encode(document) + b"\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(name: str, text: str, status: str) -> dict[str, Any]:
    return {"type": "message", "id": name, "status": status, "role": "assistant", "content": [_part(text)]}


def _called(call: ToolCall, arguments: str, status: str) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": f"fc_{call.id.removeprefix('call_')}",
        "call_id": call.id,
        "name": call.name,
        "arguments": arguments,
        "status": status,
    }
