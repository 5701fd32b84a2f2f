"""Requests to Anthropic's /v1/messages, and the conversation in them as templates know it.

As https://docs.anthropic.com/en/api/messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, cast

import msgspec

from p2pinfer.api.answers import Asked
from p2pinfer.api.errors import ApiError
from p2pinfer.api.fields import Unhonoured, bounded, stops
from p2pinfer.api.formats import form_of, schema_grammar
from p2pinfer.api.served_model import ServedModel
from p2pinfer.client_config import GenerationConfig

MAX_STOPS: Final = 16
UNHONOURED: Final[Mapping[str, Unhonoured]] = {
    "mcp_servers": Unhonoured("servers are connected to by the client", (None, [])),
    "container": Unhonoured("nothing is run"),
    "service_tier": Unhonoured("there is one", (None, "auto", "standard_only")),
    "inference_geo": Unhonoured("peers are where they are"),
    "speed": Unhonoured("there is one", (None, "standard")),
    "output_format": Unhonoured("give output_config.format"),
}
# What says who asks, and hints that change no answer: caches are kept or not, and effort is the model's.
HARMLESS: Final = frozenset(("metadata", "cache_control", "betas"))
_BETWEEN: Final = "\n\n"  # blocks of one message


class _Block(msgspec.Struct, forbid_unknown_fields=True):
    """A block of any type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    signature: Any = None
    data: Any = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[_Block] | None = None
    is_error: bool | None = None
    source: Any = None
    title: Any = None
    context: Any = None
    citations: Any = None
    caller: Any = None
    cache_control: Any = None


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[_Block]


class MessagesRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of a request that are honoured."""

    model: str
    messages: list[_Message]
    max_tokens: int | None = None
    system: str | list[_Block] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None

    def asked(self, model: ServedModel, max_tokens: int) -> Asked:
        """The request as it is understood, for an answer of so many tokens.

        Raises:
            ApiError: It cannot be honoured.
        """
        model.check(self.model)
        if not self.messages:
            raise ApiError("messages is empty", param="messages")
        bounded(self.temperature, "temperature", 0, 1)
        choice = self.tool_choice or {}
        may_call, forced = _choice(choice)
        toolbox = model.toolbox(
            _tools(self.tools or ()) if may_call else (),
            single=bool(choice.get("disable_parallel_tool_use")),
        )
        if forced and toolbox is None:
            raise ApiError("tool_choice asks for a call, and there are no tools", param="tool_choice")
        form = form_of(self._grammar(), toolbox, "output_config", forced=forced, name=choice.get("name"))
        config = GenerationConfig(
            max_new_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=stops(self.stop_sequences, MAX_STOPS, "stop_sequences"),
            grammar=form,
        )
        self._check_edits()
        told, continues = conversation(self, model)
        return Asked(told, config, 1, self._variables(model), toolbox, continues)

    def _variables(self, model: ServedModel) -> dict[str, Any]:
        match (self.thinking or {}).get("type"):
            case None | "adaptive":  # the model decides by itself
                return {}
            case "enabled" | "disabled" as said:
                return model.thinking(said == "enabled", "thinking")
            case _:
                raise ApiError("thinking.type must be enabled, adaptive or disabled", param="thinking")

    def _grammar(self) -> str | None:
        """Grammar of the form that the answer is to have; None if it may have any."""
        output = {name: value for name, value in (self.output_config or {}).items() if value is not None}
        if unknown := output.keys() - {"effort", "format"}:  # the first is a hint: a model makes its own
            raise ApiError(
                f"output_config.{min(unknown)[:50]} is not a field that this server knows; leave it out",
                param="output_config",
            )
        match output.get("format"):
            case None:
                return None
            case {"type": "json_schema", "schema": schema}:
                return schema_grammar(schema, "output_config.format.schema")
            case _:
                raise ApiError(
                    "output_config.format must be of type json_schema, with a schema", param="output_config"
                )

    def _check_edits(self) -> None:
        """Raise ApiError if old messages are to be removed."""
        edits: Any = (self.context_management or {}).get("edits") or []
        # Thinking of earlier turns is the template's matter; all else is the client's.
        listed = cast("list[object]", edits) if isinstance(edits, list) else [None]
        kinds = [cast("dict[str, object]", edit).get("type") for edit in listed if isinstance(edit, dict)]
        if len(kinds) < len(listed) or not all("thinking" in str(kind) for kind in kinds):
            raise ApiError(
                "context_management is not supported: send what is to be kept", param="context_management"
            )


def conversation(said: MessagesRequest, model: ServedModel) -> tuple[tuple[dict[str, Any], ...], bool]:
    """Messages as templates know them, and True if the last one is the beginning of the answer.

    Raises:
        ApiError: One cannot be told to the model.
    """
    told: list[dict[str, Any]] = []
    if said.system:
        told.append({"role": "system", "content": _text(said.system)})
    called: dict[str | None, str | None] = {}
    for message in said.messages:
        blocks = message.content
        if isinstance(blocks, str):
            blocks = [_Block("text", text=blocks)]
        if any(block.type in ("tool_use", "tool_result") for block in blocks) and not model.takes_tools:
            raise ApiError(
                "a message is of a tool, and tools are not supported: this model takes none", param="messages"
            )
        if message.role == "assistant":
            told.append(_answer(blocks, called))
        else:
            for each in _question(message.role, blocks, called):
                if each["role"] == "user" == (told[-1]["role"] if told else None):
                    told[-1]["content"] += _BETWEEN + each["content"]  # turns of one side are one turn
                else:
                    told.append(each)
    last = told[-1]
    return tuple(told), last["role"] == "assistant" and "tool_calls" not in last and bool(last["content"])


def _answer(blocks: Sequence[_Block], called: dict[str | None, str | None]) -> dict[str, Any]:
    """An assistant's message."""
    calls: list[dict[str, Any]] = []
    texts: list[str] = []
    told: dict[str, Any] = {"role": "assistant"}
    for block in blocks:
        match block.type:
            case "tool_use":
                called[block.id] = block.name
                function = {"name": block.name, "arguments": block.input or {}}
                calls.append({"id": block.id, "type": "function", "function": function})
            case "thinking":
                told["reasoning_content"] = told.get("reasoning_content", "") + (block.thinking or "")
            case _:
                texts.append(_text([block]))
    told["content"] = _BETWEEN.join(texts)
    if calls:
        told["tool_calls"] = calls
    return told


def _question(
    role: str, blocks: Sequence[_Block], called: Mapping[str | None, str | None]
) -> list[dict[str, Any]]:
    """A user's message, and results of tools as messages of their own."""
    told: list[dict[str, Any]] = []
    for block in blocks:
        if block.type == "tool_result":
            result = {
                "role": "tool",
                "tool_call_id": block.tool_use_id,
                "content": _text(block.content or ""),
            }
            if name := called.get(block.tool_use_id):
                result["name"] = name
            told.append(result)
        elif told and told[-1]["role"] == role:
            told[-1]["content"] += _BETWEEN + _text([block])
        else:
            told.append({"role": role, "content": _text([block])})
    return told or [{"role": role, "content": ""}]


def _text(content: str | Sequence[_Block]) -> str:
    """Text of a content.

    Raises:
        ApiError: A block of it is no text.
    """
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text" or block.text is None:
            raise ApiError(
                f"content of type {block.type[:50]!r} is not supported: the model takes text",
                param="messages",
            )
    return _BETWEEN.join(block.text or "" for block in content)


def _choice(choice: Mapping[str, Any]) -> tuple[bool, bool]:
    """True if tools may be called, and True if one has to be."""
    match choice:
        case {"type": "none"}:
            return False, False
        case {"type": "any"} | {"type": "tool", "name": str()}:
            return True, True
        case {} if choice.get("type", "auto") == "auto":
            return True, False
        case _:
            raise ApiError("tool_choice must be of type auto, any, tool or none", param="tool_choice")


_TOOL_HINTS: Final = {"cache_control", "eager_input_streaming", "type"}


def _tools(said: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tools as templates know them."""
    told: list[dict[str, Any]] = []
    for tool in said:
        if tool.get("type") not in (None, "custom"):
            raise ApiError(
                f"tools of type {str(tool['type'])[:50]!r} are not supported: the server runs none",
                param="tools",
            )
        function = {
            "parameters" if name == "input_schema" else name: value
            for name, value in tool.items()
            if name not in _TOOL_HINTS
        }
        told.append({"type": "function", "function": function})
    return told
