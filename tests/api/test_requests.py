"""Requests as they are understood: what is honoured, and why the rest is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p2pinfer.api.answers import Asked
from p2pinfer.api.config import ApiConfig
from p2pinfer.api.dialects import DIALECTS
from p2pinfer.api.errors import ApiError
from p2pinfer.api.exchange import Plan, encode
from p2pinfer.api.openai_chat import plan_chat
from p2pinfer.api.openai_completions import plan_completion
from p2pinfer.api.served_model import ServedModel
from p2pinfer.errors import LocalError
from p2pinfer.models.checkpoint.spec import ModelSpec

SPEC = ModelSpec("owner/tiny", "ab" * 16, "llama", "float32", 8, 32, 512, 1024, 2, 16, 1000)
MODEL = ServedModel(SPEC, ApiConfig(max_new_tokens=500), has_template=True)
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
TEXT: dict[str, Any] = {"model": "owner/tiny", "prompt": "Hello"}


def plan(planner: Callable[[bytes, ServedModel], Plan], wish: dict[str, Any]) -> Plan:
    return planner(json.dumps(wish).encode(), MODEL)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported: use repetition_penalty"),
        ({"temperature": 9}, "temperature is 9; it must be from 0 to 2"),
        ({"temperature": "hot"}, "temperature: Expected `float | null`, got `str`"),
        ({"n": 9}, "n is 9; this server gives 1 to 8 answers"),
        ({"n": 0}, "n is 0; this server gives 1 to 8 answers"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be 1 or more"),
        ({"top_p": -1}, "top_p"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21; it must be from 0 to 20"),
        ({"logit_bias": {"no": 1}}, "no token id"),
        ({"stop": ["a"] * 17}, "stop takes up to 16 texts"),
        ({"stop": [""]}, "stop takes up to 16 texts of 1 to"),
        ({"best_of_all": 1}, "best_of_all is not a field that this server knows; leave it out"),
        ({"stream_options": {"x": 1}}, r"stream_options\.x is not a field"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url' is not supp"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, r"messages\[0\]\.role: Invalid enum value"),
        ({"messages": [{"role": "tool", "content": "4", "tool_call_id": "x"}]}, "a message is of a tool"),
        ({"model": "gpt"}, "the model 'gpt' is not served here; this server has 'owner/tiny'"),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_refused_with_a_reason(wish: dict[str, Any], says: str) -> None:
    with pytest.raises((ApiError, LocalError), match=says):
        plan(plan_chat, CHAT | wish)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"best_of": 2}, "best_of is not supported"),
        ({"suffix": "end"}, "suffix is not supported"),
        ({"prompt": ["a", "b"]}, "prompt must be one text"),
        ({"prompt": [1, 2]}, "prompt must be one text"),
        ({"logprobs": 6}, "logprobs is 6; it must be from 0 to 5"),
        ({"echo": True, "logprobs": 1}, "echo with logprobs is not supported"),
    ],
)
def test_what_is_not_honoured_of_completions_is_refused(wish: dict[str, Any], says: str) -> None:
    with pytest.raises(ApiError, match=says):
        plan(plan_completion, TEXT | wish)


@pytest.mark.parametrize("name", ["self", "messages", "tools", "add_generation_prompt"])
def test_a_template_s_own_variables_are_not_for_requests(name: str) -> None:
    """They would be given twice, which is no fault of the server."""
    with pytest.raises(ApiError, match=f"{name} is set by the request itself"):
        plan(plan_chat, CHAT | {"chat_template_kwargs": {name: None}})


def test_what_clients_send_without_asking_for_anything_is_taken() -> None:
    sent: dict[str, Any] = {
        "tools": [],
        "tool_choice": "auto",
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "response_format": {"type": "text"},
        "store": False,
        "user": "somebody",
        "metadata": {"a": "b"},
        "n": None,
        "stop": None,
    }
    assert plan(plan_chat, CHAT | sent).asked == plan(plan_chat, CHAT).asked


def test_a_conversation_is_told_as_templates_know_it() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "refusal": "No."},
    ]
    asked: Asked = plan(plan_chat, CHAT | {"messages": messages, "max_tokens": 10_000, "stop": "end"}).asked
    assert asked.prompt == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One two"},
        {"role": "assistant", "content": "No."},
    )
    assert (asked.config.max_new_tokens, asked.config.stop) == (500, ("end",))


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
