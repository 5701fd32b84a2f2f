"""Anthropic's /v1/messages: a conversation is answered, or its tokens are counted."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from p2pinfer.api.answers import Begun, Ended, Event, Piece, TextSource, prepare
from p2pinfer.api.errors import ApiError
from p2pinfer.api.exchange import Answer, Plan, report
from p2pinfer.api.fields import decode
from p2pinfer.api.served_model import ServedModel
from p2pinfer.api.tool_calls import ToolCall
from p2pinfer.generation.generation import GenerationResult
from p2pinfer.generation.transcript import FinishReason
from p2pinfer.models.text.text import Tokenizer

from .objects import error_body, event
from .requests import HARMLESS, UNHONOURED, MessagesRequest

_REASONS: Final[Mapping[FinishReason | None, str]] = {
    "eos": "end_turn",
    "stop": "stop_sequence",
    "length": "max_tokens",
}


def plan_messages(body: bytes, model: ServedModel) -> Plan:
    """Understand a request.

    Raises:
        ApiError: It cannot be honoured.
    """
    said = decode(body, MessagesRequest, UNHONOURED, HARMLESS)
    if said.max_tokens is None:
        raise ApiError("max_tokens: Field required", param="max_tokens")
    asked = said.asked(model, model.max_tokens(said.max_tokens, "max_tokens"))
    return Plan(asked, bool(said.stream), partial(MessageShape, model.id))


async def count_tokens(body: bytes, model: ServedModel, source: TextSource) -> dict[str, Any]:
    """Tokens of a conversation, for a client that asks before it sends.

    Raises:
        ApiError: It cannot be honoured.
        LocalError: It is longer than the model's context, or the template refuses it.
    """
    said = decode(body, MessagesRequest, UNHONOURED, HARMLESS)
    (generation,) = await prepare(source, said.asked(model, 1))
    return {"input_tokens": generation.result.prompt_tokens}


class MessageShape:
    """Answers as `message` objects and events of them."""

    content_type = "text/event-stream; charset=utf-8"
    ping = event({"type": "ping"})

    def __init__(self, model: str, _: Tokenizer) -> None:
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._blocks = 0  # begun so far
        self._in_text = False

    def chunk(self, said: Event) -> bytes:
        """See `Shape`."""
        match said:
            case Begun():
                usage = {"input_tokens": said.result.prompt_tokens, "output_tokens": 0}
                empty: dict[str, Any] = {
                    "content": [],
                    "stop_reason": None,
                    "stop_sequence": None,
                    "usage": usage,
                }
                return event({"type": "message_start", "message": self._head | empty})
            case Piece():
                return self._text(said.text) + b"".join(map(self._call, said.calls))
            case Ended():
                told = {
                    "type": "message_delta",
                    "delta": _end(said.result, called=said.called),
                    "usage": _usage(said.result),
                    "p2pinfer": report(said.result, said.audits),
                }
                return self._end_text() + event(told) + event({"type": "message_stop"})

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """See `Shape`."""
        (answer,) = answers
        content: list[dict[str, Any]] = [{"type": "text", "text": answer.text}] if answer.text else []
        content += [_block(call, call.arguments) for call in answer.calls]
        return {
            **self._head,
            "content": content,
            **_end(answer.result, called=bool(answer.calls)),
            "usage": _usage(answer.result),
            "p2pinfer": report(answer.result, answer.audits),
        }

    def failed(self, error: ApiError) -> bytes:
        """See `Shape`."""
        return event(error_body(error))

    def _text(self, text: str) -> bytes:
        if not text:
            return b""
        told = b""
        if not self._in_text:
            told = self._begin({"type": "text", "text": ""})
            self._in_text = True
        return told + self._delta({"type": "text_delta", "text": text})

    def _end_text(self) -> bytes:
        if not self._in_text:
            return b""
        self._in_text = False
        return self._stop()

    def _call(self, call: ToolCall) -> bytes:
        told = self._end_text() + self._begin(_block(call, {}))
        written = msgspec.json.encode(call.arguments).decode()
        return told + self._delta({"type": "input_json_delta", "partial_json": written}) + self._stop()

    def _begin(self, block: Mapping[str, Any]) -> bytes:
        self._blocks += 1
        return event({"type": "content_block_start", "index": self._blocks - 1, "content_block": block})

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        return event({"type": "content_block_delta", "index": self._blocks - 1, "delta": delta})

    def _stop(self) -> bytes:
        return event({"type": "content_block_stop", "index": self._blocks - 1})


def _block(call: ToolCall, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def _end(result: GenerationResult, *, called: bool) -> dict[str, Any]:
    if called:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    reason = _REASONS[result.finish_reason]
    if reason == "stop_sequence" and result.stopped_by is None:
        reason = "end_turn"  # by a token of the model's own
    return {"stop_reason": reason, "stop_sequence": result.stopped_by}


def _usage(result: GenerationResult) -> dict[str, int]:
    return {"input_tokens": result.prompt_tokens, "output_tokens": len(result.token_ids)}
