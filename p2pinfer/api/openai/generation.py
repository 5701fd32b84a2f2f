"""Common part of OpenAI's two ways to generate: fields of requests, and the course of an answer."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from p2pinfer.api.answers import Begun, Ended, Event, Piece, check_choices
from p2pinfer.api.errors import ApiError
from p2pinfer.api.exchange import Answer, report
from p2pinfer.api.fields import bounded, stops
from p2pinfer.api.formats import any_object, schema_grammar
from p2pinfer.api.served_model import ServedModel
from p2pinfer.api.tool_calls import ToolCall
from p2pinfer.client_config import GenerationConfig
from p2pinfer.generation.generation import GenerationResult, Token
from p2pinfer.models.text.text import Tokenizer

from .objects import (
    DONE,
    FINISH,
    MAX_STOPS,
    PING,
    SSE,
    error_body,
    event,
    logit_bias,
    new_id,
    usage,
)


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Options of a stream. `include_obfuscation` pads the lengths of events, which changes no answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class OpenAIRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of both requests, with vLLM's names for what OpenAI has none for."""

    model: str
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
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def choices(self) -> int:
        """Number of answers."""
        return 1 if self.n is None else self.n

    @property
    def wants_usage(self) -> bool:
        """True if a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self, model: ServedModel) -> None:
        """Raise ApiError if it asks for another model, or out of the range of a field."""
        model.check(self.model)
        check_choices(self.choices, model.config.max_choices, "n")
        bounded(self.temperature, "temperature", 0, 2)

    def config(self, max_new_tokens: int, logprobs: int | None) -> GenerationConfig:
        """Settings by which each of the answers is generated.

        Raises:
            ApiError: A field is out of range.
        """
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            repetition_penalty=self.repetition_penalty,
            logit_bias=logit_bias(self.logit_bias),
            stop=stops(self.stop, MAX_STOPS),
            logprobs=logprobs,
            grammar=self._grammar(),
        )

    def _grammar(self) -> str | None:
        """Grammar of the form that the answer is to have; None if it may have any."""
        said = self.response_format or {"type": "text"}
        match said:
            case {"type": "text"}:
                return None
            case {"type": "json_object"}:
                return any_object()
            case {"type": "json_schema", "json_schema": {"schema": schema}}:
                return schema_grammar(schema, "response_format.json_schema.schema")
            case _:
                raise ApiError(
                    "response_format must be of type text, json_object, or json_schema with a schema",
                    param="response_format",
                )


class OpenAIShape(ABC):
    """Answers of one request, whole or as a stream of chunks; how a choice looks is the subclass's matter."""

    content_type = SSE
    ping = PING

    def __init__(
        self,
        kinds: tuple[str, str],
        prefix: str,
        model: str,
        tokenizer: Tokenizer,
        choices: int,
        *,
        has_logprobs: bool,
        wants_usage: bool,
    ) -> None:
        """`kinds` name the objects: a whole answer, and a chunk of a stream; `prefix` begins their id."""
        head = {"id": new_id(prefix), "created": int(time.time()), "model": model}
        self._head, self._chunk_head = ({**head, "object": kind} for kind in kinds)
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._wants_usage = wants_usage
        self._waiting: list[list[Token]] = [[] for _ in range(choices)]  # for text that they are part of
        self._results: dict[int, GenerationResult] = {}

    def chunk(self, said: Event) -> bytes:
        """See `Shape`."""
        match said:
            case Begun():
                return self._begin(said.index)
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
                **self._choice(answer),
                "finish_reason": "tool_calls" if answer.calls else FINISH[answer.result.finish_reason],
            }
            for index, answer in enumerate(answers)
        ]
        return {
            **self._head,
            "choices": choices,
            "usage": usage(results),
            "p2pinfer": report(results[0], answers[0].audits),
        }

    def failed(self, error: ApiError) -> bytes:
        """See `Shape`."""
        return event(error_body(error))

    @abstractmethod
    def _begin(self, index: int) -> bytes:
        """Chunk before the first text of a choice; empty if there is none."""

    @abstractmethod
    def _part(
        self, index: int, text: str, tokens: Sequence[Token], calls: Sequence[ToolCall] = ()
    ) -> Mapping[str, Any]:
        """Fields of a choice that tell more text, the tokens that end with it, and calls behind it."""

    @abstractmethod
    def _choice(self, answer: Answer) -> Mapping[str, Any]:
        """Fields of a choice that tell a whole answer."""

    def _piece(self, said: Piece) -> bytes:
        waiting = self._waiting[said.index]
        if self._has_logprobs and said.token is not None:
            waiting.append(said.token)
        if not said.text and not said.calls:
            return b""
        self._waiting[said.index] = []
        return self._event(said.index, self._part(said.index, said.text, waiting, said.calls))

    def _end(self, said: Ended) -> bytes:
        self._results[said.index] = said.result
        part = {**self._part(said.index, "", ()), "logprobs": None}
        reason = "tool_calls" if said.called else FINISH[said.result.finish_reason]
        told = self._event(said.index, part, reason, p2pinfer=report(said.result, said.audits))
        if len(self._results) < len(self._waiting):
            return told
        if self._wants_usage:
            results = list(self._results.values())
            told += event({**self._chunk_head, "choices": [], "usage": usage(results)})
        return told + DONE

    def _event(
        self, index: int, part: Mapping[str, Any], finish_reason: str | None = None, **own: Any
    ) -> bytes:
        choice = {"index": index, **part, "finish_reason": finish_reason}
        return event({**self._chunk_head, "choices": [choice], **own})
