"""Calls of tools in a model's text, in whatever pieces it comes."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.api.tool_calls import CallReader, Style, Toolbox, ToolCall, style_of
from p2pinfer.models.text.chat_template import ChatTemplate

from .scripted import HERMES

SCHEMAS: tuple[dict[str, Any], ...] = tuple(
    {"type": "function", "function": {"name": name}} for name in ("add", "look-up", "get_time")
)
ADD = '{"name": "add", "arguments": {"a": 2, "b": [1, "}</tool_call"]}}'
ARGUMENTS = {"a": 2, "b": [1, "}</tool_call"]}


def read(
    style: Style, pieces: list[str], *, single: bool = False
) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """The text and the calls of an answer."""
    reader = CallReader(Toolbox(SCHEMAS, style, single))
    told = [reader.push(piece) for piece in pieces] + [reader.finish()]
    calls = [(call.name, dict(call.arguments)) for _, each in told for call in each]
    return "".join(text for text, _ in told), calls


CASES: list[tuple[Style, str, str, list[tuple[str, dict[str, Any]]]]] = [
    ("hermes", f"<tool_call>\n{ADD}\n</tool_call>", "", [("add", ARGUMENTS)]),
    (
        "hermes",
        f'Let me see.\n<tool_call>{ADD}</tool_call>\n<tool_call>{{"name": "get_time"}}</tool_call>\n',
        "Let me see.",
        [("add", ARGUMENTS), ("get_time", {})],
    ),
    ("hermes", f"<tool_call>{ADD}", "", [("add", ARGUMENTS)]),  # the closing mark ended the answer
    ("hermes", "a < b, <tool> and <tool_call", "a < b, <tool> and <tool_call", []),
    ("hermes", "<tool_call>{no json}</tool_call> so", "<tool_call>{no json}</tool_call> so", []),
    ("hermes", '<tool_call>{"name": "rm"}</tool_call>', '<tool_call>{"name": "rm"}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "add", "argu', '<tool_call>{"name": "add", "argu', []),
    ("hermes", "Two \n\n words \n", "Two \n\n words \n", []),
    ("hermes", '{"name": "add"}', '{"name": "add"}', []),
    ("mistral", f"[TOOL_CALLS][{ADD}, {ADD}]", "", [("add", ARGUMENTS)] * 2),
    ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1}', "", [("add", {"a": 1})]),
    (
        "mistral",
        'Well[TOOL_CALLS]add[CALL_ID]x1[ARGS]{"a": 1}[TOOL_CALLS]look-up[ARGS]{}',
        "Well",
        [("add", {"a": 1}), ("look-up", {})],
    ),
    ("mistral", "[TOOL_CALLS]no", "[TOOL_CALLS]no", []),
    ("llama", '{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
    ("llama", ' {"name": "add", "parameters": "{\\"a\\": 1}"}', "", [("add", {"a": 1})]),
    (
        "llama",
        '<|python_tag|>{"name": "add", "parameters": {}}; {"name": "get_time", "parameters": {}}',
        "",
        [("add", {}), ("get_time", {})],
    ),
    ("llama", '{"answer": 4}', '{"answer": 4}', []),
    ("llama", 'It is {"name": "add"}', 'It is {"name": "add"}', []),
    ("llama", '{"name": "add", "parameters": [1]}', '{"name": "add", "parameters": [1]}', []),
]


@pytest.mark.parametrize(("style", "text", "shown", "calls"), CASES)
def test_calls_and_text_are_told_apart(
    style: Style, text: str, shown: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    assert read(style, [text]) == (shown, calls)


@given(st.sampled_from(CASES), st.randoms(use_true_random=False))
def test_it_does_not_matter_how_the_text_is_cut(
    case: tuple[Style, str, str, list[tuple[str, dict[str, Any]]]], random: Any
) -> None:
    style, text, shown, calls = case
    cuts = sorted({0, len(text), *(random.randrange(len(text) + 1) for _ in range(random.randrange(9)))})
    pieces = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
    assert read(style, pieces) == (shown, calls)
    assert read(style, list(text)) == (shown, calls)


def test_text_is_shown_as_soon_as_it_cannot_be_a_call() -> None:
    reader = CallReader(Toolbox(SCHEMAS, "hermes"))
    told = [reader.push(piece)[0] for piece in ("Once ", "upon <", "t", "able>", " a")]
    assert told == ["Once", " upon", "", " <table>", " a"]


def test_one_call_is_enough_where_one_is_asked_for() -> None:
    assert read("mistral", [f"[TOOL_CALLS][{ADD}, {ADD}]"], single=True)[1] == [("add", ARGUMENTS)]


def test_what_is_nested_without_end_is_text() -> None:
    text = "<tool_call>" + "[" * 100_000 + "</tool_call>"
    assert read("hermes", [text]) == (text, [])


@pytest.mark.parametrize(
    ("source", "style"),
    [
        ("{{ messages }}", None),
        ("{{ tools }} <tool_call>", "hermes"),
        ("{{ tools }} <tool_call><function=", None),
        ("{{ tools }} [TOOL_CALLS]", "mistral"),
        ("{{ tools }} <|python_tag|>", "llama"),
        ("{{ tools }}", None),
    ],
)
def test_the_form_of_calls_is_seen_in_the_template(source: str, style: Style | None) -> None:
    assert style_of(ChatTemplate({"default": source}, {})) == style
    assert style_of(ChatTemplate({"default": "", "tool_use": source}, {})) == style


def test_every_call_has_a_name_of_its_own() -> None:
    assert style_of(HERMES) == "hermes"
    assert style_of(None) is None
    first, second = ToolCall("add", {"a": "é"}), ToolCall("add", {})
    assert first.id != second.id
    assert json.loads(first.arguments_json) == {"a": "é"}
