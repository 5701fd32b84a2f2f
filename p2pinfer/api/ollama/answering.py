"""Ollama's /api/chat and /api/generate: answers as lines of JSON, or as one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from p2pinfer.api.answers import Begun, Ended, Event, Piece
from p2pinfer.api.errors import ApiError
from p2pinfer.api.exchange import Answer, Plan, encode, report
from p2pinfer.api.fields import decode
from p2pinfer.api.served_model import ServedModel
from p2pinfer.api.token_texts import LEAST_LOGPROB, token_text, told_tokens
from p2pinfer.api.tool_calls import ToolCall
from p2pinfer.audit.tally import AuditTally
from p2pinfer.generation.generation import GenerationResult, Token
from p2pinfer.models.text.text import Tokenizer

from .objects import error_body, time_of
from .requests import HARMLESS, UNHONOURED, UNHONOURED_OF_TEXTS, ChatRequest, TextRequest


def plan_chat(body: bytes, model: ServedModel) -> Plan | dict[str, Any]:
    """Understand a request to /api/chat; without messages it is answered at once.

    Raises:
        ApiError: It cannot be honoured.
    """
    said = decode(body, ChatRequest, UNHONOURED, HARMLESS)
    model.check(said.model)
    if not said.messages:
        return _loaded(said.model, {"message": {"role": "assistant", "content": ""}})
    return Plan(said.asked(model), said.streamed, partial(ChatLines, said.model, bool(said.logprobs)))


def plan_text(body: bytes, model: ServedModel) -> Plan | dict[str, Any]:
    """Understand a request to /api/generate; without a prompt it is answered at once.

    Raises:
        ApiError: It cannot be honoured.
    """
    said = decode(body, TextRequest, UNHONOURED_OF_TEXTS, HARMLESS)
    model.check(said.model)
    if not said.prompt:
        return _loaded(said.model, {"response": ""})
    return Plan(said.asked(model), said.streamed, partial(TextLines, said.model, bool(said.logprobs)))


def _loaded(model: str, empty: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, "created_at": time_of(time.time()), **empty, "done": True, "done_reason": "load"}


class TextLines:
    """Answers of /api/generate."""

    content_type = "application/x-ndjson"
    ping = b""  # a line is an answer

    def __init__(self, model: str, has_logprobs: bool, tokenizer: Tokenizer) -> None:
        self._model = model  # by the name that it was called
        self._has_logprobs = has_logprobs
        self._tokenizer = tokenizer
        self._waiting: list[Token] = []  # for text that they are part of
        self._began = time.perf_counter_ns()

    def chunk(self, said: Event) -> bytes:
        """See `Shape`."""
        match said:
            case Begun():
                return b""
            case Piece():
                return self._piece(said)
            case Ended():
                return encode({**self._words("", ()), **self._end(said.result, said.audits)}) + b"\n"

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """See `Shape`."""
        (answer,) = answers
        words = self._words(answer.text, answer.calls)
        return {**words, **self._logprobs(answer.tokens), **self._end(answer.result, answer.audits)}

    def failed(self, error: ApiError) -> bytes:
        """See `Shape`."""
        return encode(error_body(error)) + b"\n"

    def _piece(self, said: Piece) -> bytes:
        if self._has_logprobs and said.token is not None:
            self._waiting.append(said.token)
        if not said.text and not said.calls:
            return b""
        logs, self._waiting = self._logprobs(self._waiting), []
        return encode({**self._words(said.text, said.calls), **logs, "done": False}) + b"\n"

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Field that tells how likely the tokens were, if it is asked for."""
        if not self._has_logprobs:
            return {}
        told = [
            self._entry(token_id, logs.token)
            | {"top_logprobs": [self._entry(other, value) for other, value in logs.likeliest]}
            for token_id, logs in told_tokens(self._tokenizer, tokens)
        ]
        return {"logprobs": told}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, written = token_text(self._tokenizer, token_id)
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": written}

    def _words(self, text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
        return {"model": self._model, "created_at": time_of(time.time()), **self._said(text, calls)}

    def _said(self, text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
        assert not calls, "a text is given no tools"
        return {"response": text}

    def _end(self, result: GenerationResult, audits: AuditTally) -> dict[str, Any]:
        """Last fields; durations are whole nanoseconds, as clients read them."""
        timings, count = result.timings, len(result.token_ids)
        total = time.perf_counter_ns() - self._began
        prompt = min(int(timings.first_token_s * 1e9), total)
        rest = int((count - 1) / timings.tokens_per_s * 1e9) if timings.tokens_per_s > 0 else 0
        rest = min(rest, total - prompt)
        return {
            "done": True,
            "done_reason": "length" if result.finish_reason == "length" else "stop",
            "total_duration": total,
            "load_duration": total - prompt - rest,
            "prompt_eval_count": result.prompt_tokens,
            "prompt_eval_duration": prompt,
            "eval_count": count,
            "eval_duration": rest,
            "p2pinfer": report(result, audits),
        }


class ChatLines(TextLines):
    """Answers of /api/chat."""

    def _said(self, text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = [
                {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        return {"message": message}
