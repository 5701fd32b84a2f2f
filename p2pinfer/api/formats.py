"""Forms that an answer is held to: a JSON schema, or the call of a tool, as grammars.

Where the tokens are chosen, a grammar forbids those that may not follow (models/text/grammar.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

import msgspec

from p2pinfer.models.text.grammar import json_rule

from .errors import ApiError
from .tool_calls import Style, Toolbox

# What a call looks like around a tool's name and its arguments; the marks may be spelt by any tokens.
_AROUND: Final[Mapping[Style, tuple[str, str, str, str]]] = {
    "hermes": ("<tool_call>\n", '{"name": "', '", "arguments": ', "}\n</tool_call>"),
    "mistral": ("[TOOL_CALLS]", '[{"name": "', '", "arguments": ', "}]"),
    "llama": ("", '{"name": "', '", "parameters": ', "}"),
}


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


def call_grammar(toolbox: Toolbox, name: str | None) -> str:
    """Grammar of one call of the tool of that name; of any tool if it is None.

    Raises:
        ApiError: There is no such tool.
    """
    chosen = [each["function"] for each in toolbox.schemas if name in (None, each["function"]["name"])]
    if not chosen:
        raise ApiError(
            f"tool_choice names {str(name)[:100]!r}, which is none of the tools", param="tool_choice"
        )
    mark, begin, middle, end = _AROUND[toolbox.style]
    rules = [f"start: {' | '.join(f'call_{index}' for index in range(len(chosen)))}"]
    for index, function in enumerate(chosen):
        head = msgspec.json.encode(f"{mark}{begin}{function['name']}{middle}").decode()
        rules.append(f"call_{index}: {head} arguments_{index} {msgspec.json.encode(end).decode()}")
        parameters: dict[str, Any] = function.get("parameters") or {}
        schema = {"type": "object", **parameters}
        rules.append(f"arguments_{index}: {json_rule(schema)}")
    return "\n".join(rules)


def check_alone(grammar: str | None, toolbox: Toolbox | None, param: str) -> None:
    """Nothing, unless an answer is held to a form and may call tools, whose calls have another one.

    Raises:
        ApiError: It is.
    """
    if grammar is not None and toolbox is not None:
        raise ApiError(f"{param} and tools are not supported together; give one of them", param=param)
