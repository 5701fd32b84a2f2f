"""Requests of whatever dialect: the same is understood from each, and nothing but a request is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p2pinfer.api.anthropic.messages import plan_messages
from p2pinfer.api.config import ApiConfig
from p2pinfer.api.dialects import DIALECTS
from p2pinfer.api.errors import ApiError
from p2pinfer.api.exchange import Plan, encode
from p2pinfer.api.ollama.answering import plan_chat as plan_ollama_chat
from p2pinfer.api.openai.chat import plan_chat
from p2pinfer.api.served_model import ServedModel
from p2pinfer.errors import LocalError
from p2pinfer.models.text.chat_template import ChatTemplate

from .plans import CALL, CHAT, MODEL, SPEC, TEXT, TOOL, TOOLED, plan


def test_a_conversation_with_tools_is_told_the_same_by_every_dialect() -> None:
    question = {"role": "user", "content": "Add"}
    told = (
        question,
        {
            "role": "assistant",
            "content": "Well.",
            "tool_calls": [CALL | {"function": {"name": "add", "arguments": {"a": 2}}}],
        },
        {"role": "tool", "content": "2", "name": "add", "tool_call_id": "c1"},
    )
    answer = {"role": "assistant", "content": "Well."}
    result = {"role": "tool", "content": "2", "tool_call_id": "c1"}
    openai = {"messages": [question, answer | {"tool_calls": [CALL]}, result], "tools": [TOOL]}
    blocks = [
        {"type": "text", "text": "Well."},
        {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 2}},
    ]
    results = [{"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "2"}]}]
    anthropic = {
        "max_tokens": 9,
        "messages": [
            question,
            {"role": "assistant", "content": blocks},
            {"role": "user", "content": results},
        ],
        "tools": [{"name": "add", "input_schema": {"type": "object"}}],
    }
    call = {"id": "c1", "function": {"name": "add", "arguments": {"a": 2}}}
    ollama = {
        "messages": [question, answer | {"tool_calls": [call]}, result | {"tool_name": "add"}],
        "tools": [TOOL],
    }
    wishes: list[tuple[Callable[..., Plan | dict[str, Any]], dict[str, Any]]] = [
        (plan_chat, openai),
        (plan_messages, anthropic),
        (plan_ollama_chat, ollama),
    ]
    for planner, wish in wishes:
        asked = plan(planner, wish | {"model": "tiny"}, TOOLED).asked
        assert asked.prompt == told
        assert asked.toolbox is not None
        assert asked.toolbox.schemas == (TOOL,)


def test_thinking_is_switched_where_the_template_has_a_switch() -> None:
    template = ChatTemplate({"default": "{{ enable_thinking }}"}, {})
    model = ServedModel(SPEC, ApiConfig(), template)
    enough = CHAT | {"max_tokens": 5}
    for thinking, expected in (
        ({"type": "enabled"}, {"enable_thinking": True}),
        ({"type": "disabled"}, {"enable_thinking": False}),
        ({"type": "adaptive"}, {}),
    ):
        assert plan(plan_messages, enough | {"thinking": thinking}, model).asked.variables == expected
    for think, says in (("high", "think is 'high'; it must be true or false"), (True, "has no switch")):
        with pytest.raises(ApiError, match=says):
            plan(plan_ollama_chat, CHAT | {"think": think}, TOOLED)
    assert plan(plan_ollama_chat, CHAT | {"think": False}, model).asked.variables == {
        "enable_thinking": False
    }
    assert plan(plan_messages, enough | {"thinking": {"type": "disabled"}}).asked.variables == {}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b'{"model": "\\ud800"}',
        b"1" * 10_000,
        b'{"model": NaN}',
    ],
)
def test_what_is_no_request_is_refused(body: bytes) -> None:
    for dialect in DIALECTS:
        for planner in dialect.generate.values():
            with pytest.raises(ApiError, match="JSON"):
                planner(body, MODEL)


def test_a_request_that_is_nested_deeply_is_refused() -> None:
    """As no JSON by Pythons whose parser has that limit, for its unknown field by the others."""
    body = b'{"a":' * 5000 + b"1" + b"}" * 5000
    for dialect in DIALECTS:
        for planner in dialect.generate.values():
            with pytest.raises(ApiError, match=r"JSON|a is not a field"):
                planner(body, MODEL)


NAMES = [
    "model",
    "messages",
    "prompt",
    "stream",
    "stop",
    "n",
    "seed",
    "logprobs",
    "top_logprobs",
    "temperature",
    "top_p",
    "max_tokens",
    "role",
    "content",
    "type",
    "text",
    "logit_bias",
    "tools",
    "system",
    "options",
    "stream_options",
    "chat_template_kwargs",
    "format",
    "name",
    "num_predict",
    "echo",
    "tool_choice",
    "tool_calls",
    "function",
    "thinking",
    "context_management",
    "edits",
    "input",
    "stop_sequences",
]
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(["tiny", "user", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(NAMES), JSON_VALUES))
@example({"model": "tiny", "messages": [{"role": "user", "content": "x"}], "top_k": 1 << 70, "seed": 1 << 70})
@example({"model": "tiny", "messages": [{"role": "user", "content": "x"}], "logit_bias": {"9" * 5000: 1}})
def test_whatever_is_asked_is_understood_or_refused(wish: dict[str, Any]) -> None:
    """No other error: it would be a bug of ours."""
    for wished in (wish, CHAT | wish, TEXT | wish):
        body = msgspec.json.encode(wished)
        for dialect in DIALECTS:
            for planner in dialect.generate.values():
                try:
                    planner(body, MODEL)
                except ApiError as exc:
                    assert encode(dialect.error_body(exc))
                except LocalError as exc:
                    assert str(exc)


def test_what_some_clients_take_for_ends_of_lines_is_escaped() -> None:
    encoded = encode({"text": "a\u2028b\u2029c\x85d\u00e9"})
    assert encoded == b'{"text":"a\\u2028b\\u2029c\\u0085d\xc3\xa9"}'
    assert msgspec.json.decode(encoded) == {"text": "a\u2028b\u2029c\x85d\u00e9"}
