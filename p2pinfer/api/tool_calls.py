"""Calls of tools, read from the text of an answer as it comes.

A model that was taught to call tools writes calls as text, in the form that its chat template shows it:

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>           Hermes, Qwen
    [TOOL_CALLS][{"name": ..., "arguments": {...}}]                    Mistral; newer: name[ARGS]{...}
    {"name": ..., "parameters": {...}}                                 Llama 3.1, often behind <|python_tag|>

The brackets of the last two are special tokens, which are hidden in the text; the reader is told of them
(`CALL_MARKS`).
What looks like a call and is none, because it is no JSON or names no tool that was given, stays text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, cast

from p2pinfer.models.text.chat_template import ChatTemplate

Style: TypeAlias = Literal["hermes", "mistral", "llama"]
OPENING_MARKS: Final[Mapping[Style, str]] = {
    "hermes": "<tool_call>",
    "mistral": "[TOOL_CALLS]",
    "llama": "<|python_tag|>",
}
_CLOSE: Final[Mapping[Style, str]] = {"hermes": "</tool_call>"}  # the others end with the answer
_NAMED: Final = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]")
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_BETWEEN: Final = " \t\r\n;,"
_CLUES: Final[tuple[tuple[str, Style], ...]] = (
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama"),
    ('"parameters": dictionary of argument name', "llama"),
)
_UNREAD: Final = "<function="  # of Qwen3-Coder: calls in a markup of their own


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool. `id` is this server's name for it."""

    name: str
    arguments: Mapping[str, Any]
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    @property
    def arguments_json(self) -> str:
        """The arguments as text."""
        return json.dumps(self.arguments, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Toolbox:
    """Tools that an answer may call.

    Attributes:
        schemas: As templates know them: {"type": "function", "function": {"name": ..., ...}}.
        style: Form in which the model writes calls.
        single: The answer ends with its first call.
    """

    schemas: tuple[Mapping[str, Any], ...]
    style: Style
    single: bool = False

    @property
    def names(self) -> frozenset[str]:
        """Names of the tools."""
        return frozenset(schema["function"]["name"] for schema in self.schemas)


def style_of(template: ChatTemplate | None) -> Style | None:
    """Form in which a model with that template writes calls; None if it makes none, or in another form."""
    if template is None:
        return None
    source = template.sources.get("tool_use", template.sources["default"])
    if "tools" not in source or _UNREAD in source:
        return None
    return next((style for clue, style in _CLUES if clue in source), None)


class CallReader:
    """Parts the text of one answer into text and calls. White space around calls is no text."""

    def __init__(self, toolbox: Toolbox) -> None:
        self._style: Style = toolbox.style
        self._names = toolbox.names
        self._most = 1 if toolbox.single else None
        self._open, self._close = OPENING_MARKS[toolbox.style], _CLOSE.get(toolbox.style)
        self._held = ""  # text that may be the beginning of a call, or is one
        self._in_call = False
        self._begun = False  # anything has been shown
        self._called = False

    def push(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """The text and the calls that become certain with `text`; marks are part of it."""
        self._held += text
        shown, calls = self._show(), list[ToolCall]()
        while self._in_call and self._close and (end := self._held.find(self._close)) >= 0:
            end += len(self._close)
            written, self._held = self._held[:end], self._held[end:]
            self._in_call = False
            found = self._calls_in(written)
            calls += found
            shown += ("" if found else written) + self._show()
        return shown, tuple(calls)

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        """The rest, at the end of the answer."""
        held, self._held = self._held, ""
        calls = self._calls_in(held) if self._in_call else ()
        is_space = self._called and not held.strip()
        return ("" if calls or is_space else held), calls

    def _show(self) -> str:
        """Text that is certain to be no call; notes where one begins."""
        start = self._held.find(self._open)
        if self._style == "llama" and not self._begun and self._held.lstrip().startswith("{"):
            start = self._held.index("{")
        self._in_call = start >= 0
        if not self._in_call:
            start = len(self._held) - _overlap(self._held, self._open)
        start = len(self._held[:start].rstrip())
        shown, self._held = self._held[:start], self._held[start:]
        self._begun = self._begun or bool(shown)
        return shown

    def _calls_in(self, written: str) -> tuple[ToolCall, ...]:
        written = written.replace(self._open, " ").removesuffix(self._close or "\0")
        try:
            calls = tuple(_parse(written, self._names))[: self._most]
        except (ValueError, RecursionError):
            return ()
        self._called = self._called or bool(calls)
        return calls


def _parse(written: str, names: frozenset[str]) -> list[ToolCall]:
    """Calls of tools of these names.

    Raises:
        ValueError: It is none.
    """
    decoder, calls, at = json.JSONDecoder(), list[ToolCall](), 0
    value: object
    while at < len(written):
        if written[at] in _BETWEEN:
            at += 1
            continue
        named = _NAMED.match(written, at)
        value, at = decoder.raw_decode(written, named.end() if named else at)
        if named:
            calls.append(_call({"name": named[1], "arguments": value}, names))
        else:
            several = cast("list[object]", value) if isinstance(value, list) else [value]
            calls += [_call(each, names) for each in several]
    return calls


def _call(said: object, names: frozenset[str]) -> ToolCall:
    fields: dict[str, object] = cast("dict[str, object]", said) if isinstance(said, dict) else {}
    if not isinstance(name := fields.get("name"), str) or name not in names:
        raise ValueError("it names no tool that was given")
    arguments = fields.get("arguments", fields.get("parameters", dict[str, object]()))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("its arguments are no object")
    return ToolCall(name, cast("dict[str, Any]", arguments))


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that `mark` begins with."""
    return next(
        (size for size in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-size:])), 0
    )


def fault_of(schemas: Sequence[Mapping[str, Any]]) -> str | None:
    """The fault of tools, as the end of a sentence; None if they have none."""
    names: list[Any] = []
    for schema in schemas:
        function: Any = schema.get("function")
        if schema.get("type") != "function" or not isinstance(function, dict) or len(schema) > 2:
            return "is no function; only functions of the client's are called"
        said = cast("dict[str, Any]", function)
        names.append(name := said.get("name"))
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            return "has a name of other than 1 to 128 letters, digits, dots, _ and -"
        if not isinstance(said.get("parameters", {}), dict | None):
            return "has parameters that are no JSON schema"
        if not isinstance(said.get("strict"), bool | None):
            return "has a field 'strict' that is neither true nor false"
        if unknown := said.keys() - {"name", "description", "parameters", "strict"}:
            return f"has a field {min(unknown)[:50]!r} that this server does not know"
    return "has a name twice" if len({*names}) < len(names) else None
