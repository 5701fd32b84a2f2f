"""Requests to Ollama's /api/chat and /api/generate.

As https://docs.ollama.com/api. Both stream unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, Literal

import msgspec

from p2pinfer.api.answers import Asked
from p2pinfer.api.errors import ApiError
from p2pinfer.api.fields import Unhonoured, bounded, check_neutral, stops
from p2pinfer.api.formats import any_object, form_of, schema_grammar
from p2pinfer.api.served_model import ServedModel
from p2pinfer.client_config import GenerationConfig

MAX_STOPS: Final = 16
MAX_TOP_LOGPROBS: Final = 20
UNHONOURED: Final[Mapping[str, Unhonoured]] = {
    "images": Unhonoured("the model takes text", (None, [])),
    "truncate": Unhonoured("a prompt that is too long is refused", (None, False)),
    "shift": Unhonoured("an answer ends where the context does", (None, False)),
}
UNHONOURED_OF_TEXTS: Final[Mapping[str, Unhonoured]] = {
    **UNHONOURED,
    "suffix": Unhonoured("texts are continued, not filled in", (None, "")),
    "template": Unhonoured("the model's own is used; give raw and the whole prompt", (None, "")),
    "context": Unhonoured("nothing is kept; use /api/chat", (None, [])),
}
HARMLESS: Final = frozenset(("keep_alive",))  # the model is there for as long as the server is
_OPTIONS: Final[Mapping[str, Unhonoured]] = {
    "repeat_last_n": Unhonoured("all of the text counts, which is -1", (None, -1)),
    "presence_penalty": Unhonoured("use repeat_penalty", (None, 0)),
    "frequency_penalty": Unhonoured("use repeat_penalty", (None, 0)),
    "penalize_newline": Unhonoured("a newline is a token like others", (None, True)),
    "mirostat": Unhonoured("use top_p or min_p", (None, 0)),
    "tfs_z": Unhonoured("use top_p or min_p", (None, 1)),
    "num_keep": Unhonoured("no token is left out", (None, 0, -1)),
}
# About a computer that runs the model, which peers do; the last two mean nothing without mirostat.
_OF_THE_MACHINE: Final = frozenset(
    (
        "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "use_mlock", "low_vram", "numa",
        "f16_kv", "vocab_only", "logits_all", "embedding_only", "draft_num_predict", "mirostat_tau",
        "mirostat_eta",
    )
)  # fmt: skip


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    num_predict: int | None = None
    num_ctx: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None


class OllamaRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of both requests that are honoured."""

    model: str
    stream: bool | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    format: str | dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def streamed(self) -> bool:
        """True if the answer is sent as it is generated."""
        return self.stream is not False

    def config(self, model: ServedModel) -> GenerationConfig:
        """Settings of the answer.

        Raises:
            ApiError: They cannot be honoured.
        """
        said = self.options or {}
        check_neutral(said, _OPTIONS)
        kept = {name: said[name] for name in said.keys() - _OPTIONS.keys() - _OF_THE_MACHINE}
        try:
            options = msgspec.convert(kept, _Options)
        except msgspec.ValidationError as exc:
            raise ApiError(f"options: {exc}", param="options") from exc
        if options.num_ctx is not None and options.num_ctx > model.spec.max_positions:
            raise ApiError(
                f"num_ctx is {options.num_ctx}; the context of {model.id} is {model.spec.max_positions} "
                "tokens",
                param="options",
            )
        limit = options.num_predict
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
        bounded(self.top_logprobs, "top_logprobs", 0, MAX_TOP_LOGPROBS)
        return GenerationConfig(
            # Below 0: as many as it likes.
            max_new_tokens=model.max_tokens(
                None if limit is not None and limit < 0 else limit, "num_predict"
            ),
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            typical_p=options.typical_p,
            repetition_penalty=options.repeat_penalty,
            seed=options.seed,
            stop=stops(options.stop, MAX_STOPS),
            grammar=self._grammar(),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def _grammar(self) -> str | None:
        """Grammar of the form that the answer is to have; None if it may have any."""
        match self.format:
            case None | "":
                return None
            case "json":
                return any_object()
            case dict():
                return schema_grammar(self.format, "format")
            case _:
                raise ApiError(f"format is {self.format[:50]!r}; it must be json or a schema", param="format")

    def variables(self, model: ServedModel) -> dict[str, Any]:
        """Variables of the chat template.

        Raises:
            ApiError: Thinking is asked for, and cannot be switched on.
        """
        if isinstance(self.think, str):
            raise ApiError(f"think is {self.think[:50]!r}; it must be true or false here", param="think")
        return model.thinking(self.think, "think")


class _CalledFunction(msgspec.Struct):
    name: str
    arguments: dict[str, Any] = {}
    description: Any = None
    index: int | None = None


class _Call(msgspec.Struct):
    function: _CalledFunction
    id: str | None = None


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    tool_calls: list[_Call] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: list[Any] | None = None


class ChatRequest(OllamaRequest):
    """A request to /api/chat."""

    messages: list[_Message] = []
    tools: list[dict[str, Any]] | None = None

    def asked(self, model: ServedModel) -> Asked:
        """The request as it is understood.

        Raises:
            ApiError: It cannot be honoured.
        """
        toolbox = model.toolbox(self.tools or ())
        config = self.config(model)
        config = replace(config, grammar=form_of(config.grammar, toolbox, "format"))
        told = tuple(_as_told(message, model) for message in self.messages)
        return Asked(told, config, 1, self.variables(model), toolbox)


class TextRequest(OllamaRequest):
    """A request to /api/generate."""

    prompt: str = ""  # an empty one asks to load the model
    system: str | None = None
    raw: bool | None = None

    def asked(self, model: ServedModel) -> Asked:
        """The request as it is understood: a chat of one message, where the model has a template."""
        if self.raw or model.template is None:
            if self.system:
                raise ApiError(
                    "system is not supported: it is part of a chat, and this prompt is none", param="system"
                )
            if self.think:
                raise ApiError("think is not supported: this prompt is no chat", param="think")
            return Asked(self.prompt, self.config(model))
        told: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        told.append({"role": "user", "content": self.prompt})
        return Asked(tuple(told), self.config(model), 1, self.variables(model))


def _as_told(message: _Message, model: ServedModel) -> dict[str, Any]:
    """A message as templates know it."""
    if message.images:
        raise ApiError("a message has images: the model takes text", param="messages")
    if (message.tool_calls or message.role == "tool") and not model.takes_tools:
        raise ApiError(
            "a message is of a tool, and tools are not supported: this model takes none", param="messages"
        )
    told: dict[str, Any] = {"role": message.role, "content": message.content}
    for name, value in (
        ("name", message.tool_name),
        ("tool_call_id", message.tool_call_id),
        ("reasoning_content", message.thinking),
    ):
        if value:
            told[name] = value
    if message.tool_calls:
        told["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    return told
