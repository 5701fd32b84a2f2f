"""Forms that an answer is held to: a JSON schema, or calls of tools, as grammars.

Where the tokens are chosen, a grammar forbids those that may not follow (models/text/grammar.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import msgspec

from p2pinfer.models.text.grammar import json_rule

from .errors import ApiError
from .tool_calls import OPENING_MARKS, Style, Toolbox

# Around the name of a tool, and behind its arguments, in one call. What is in quotes in these tables may be
# spelt by any tokens, marks also by the special tokens that they are.
_CALL: Final[Mapping[Style, tuple[str, str, str]]] = {
    "hermes": ('\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
    "mistral": ('{"name": "', '", "arguments": ', "}"),
    "llama": ('{"name": "', '", "parameters": ', "}"),
}
# Lark rules of an answer that is one call, and of one that may have text and calls. `lead` is text up to the
# first mark, so that behind a mark nothing but a call can follow.
_ONE_CALL: Final[Mapping[Style, str]] = {
    "hermes": '"<tool_call>" call',
    "mistral": '"[TOOL_CALLS][" call "]"',
    "llama": "call",
}
_TEXT_AND_CALLS: Final[Mapping[Style, str]] = {
    "hermes": "(lead call)* TEXT",
    "mistral": 'TEXT | lead "[" call (", " call)* "]" | lead named ("[TOOL_CALLS]" named)*',
    "llama": 'TEXT | lead? call ("; " call)*',
}
_ANY_TEXT: Final = r"/(.|\n)*/"
_NO_JSON: Final = r"/(\s*[^\s{](.|\n)*)?/"  # an answer that begins with { is a call


def any_object() -> str:
    """Grammar of JSON objects."""
    return schema_grammar({"type": "object"}, "")


def schema_grammar(schema: object, param: str) -> str:
    """Grammar of JSON that follows a schema, which `param` of a request gives.

    Raises:
        ApiError: It is no schema.
    """
    if not isinstance(schema, dict):
        raise ApiError(f"{param} must be a JSON schema", param=param)
    return msgspec.json.encode(cast("dict[str, Any]", schema)).decode()


def form_of(
    own: str | None, toolbox: Toolbox | None, param: str, *, forced: bool = False, name: str | None = None
) -> str | None:
    """Grammar that an answer is held to; None if it may be anything.

    Args:
        own: Of the form that field `param` of the request asks for.
        forced: The answer has to be a call of a tool: of `name`, or of any if that is None.

    Raises:
        ApiError: It has a form and may call tools, whose calls have another one; or there is no such tool.
    """
    if toolbox is None:
        return own
    if own is not None:
        raise ApiError(f"{param} and tools are not supported together; give one of them", param=param)
    return call_grammar(toolbox, name) if forced else strict_grammar(toolbox)


def call_grammar(toolbox: Toolbox, name: str | None) -> str:
    """Grammar of one call of the tool of that name; of any tool if it is None.

    Raises:
        ApiError: There is no such tool.
    """
    functions = [each["function"] for each in toolbox.schemas]
    chosen = [each for each in functions if name in (None, each["name"])]
    if not chosen:
        raise ApiError(
            f"tool_choice names {str(name)[:100]!r}, which is none of the tools", param="tool_choice"
        )
    return "\n".join([f"start: {_ONE_CALL[toolbox.style]}", *_calls(chosen, toolbox.style)])


def strict_grammar(toolbox: Toolbox) -> str | None:
    """Grammar of text in which every call of a strict tool follows its parameters; None if none is strict."""
    functions = [each["function"] for each in toolbox.schemas]
    if not any(each.get("strict") for each in functions):
        return None
    style = toolbox.style
    held = [each if each.get("strict") else {"name": each["name"]} for each in functions]
    return "\n".join(
        [
            f"start: {_TEXT_AND_CALLS[style]}",
            f"lead[lazy]: TEXT {_quoted(OPENING_MARKS[style])}",
            f"TEXT: {_NO_JSON if style == 'llama' else _ANY_TEXT}",
            *_calls(held, style),
            *(_named_calls(held) if style == "mistral" else ()),
        ]
    )


def _calls(functions: Sequence[Mapping[str, Any]], style: Style) -> list[str]:
    """Rules of `call`, a call of one of these functions."""
    begin, middle, end = _CALL[style]
    rules = [f"call: {' | '.join(f'call_{index}' for index in range(len(functions)))}"]
    for index, function in enumerate(functions):
        parameters: dict[str, Any] = function.get("parameters") or {}
        head = _quoted(f"{begin}{function['name']}{middle}")
        rules.append(f"call_{index}: {head} arguments_{index} {_quoted(end)}")
        rules.append(f"arguments_{index}: {json_rule({'type': 'object', **parameters})}")
    return rules


def _named_calls(functions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rules of `named`, a call as newer models of Mistral write it, by the arguments of `_calls`."""
    called = [
        f'{_quoted(each["name"])} id? "[ARGS]" arguments_{index}' for index, each in enumerate(functions)
    ]
    return [f"named: {' | '.join(called)}", r'id: "[CALL_ID]" /\w{1,32}/']


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()
