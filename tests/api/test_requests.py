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
from p2pinfer.api.anthropic.messages import plan_messages
from p2pinfer.api.config import ApiConfig
from p2pinfer.api.dialects import DIALECTS
from p2pinfer.api.errors import ApiError
from p2pinfer.api.exchange import Plan, encode
from p2pinfer.api.ollama.answering import plan_chat as plan_ollama_chat
from p2pinfer.api.ollama.answering import plan_text as plan_ollama_text
from p2pinfer.api.openai.chat import plan_chat
from p2pinfer.api.openai.completions import plan_completion
from p2pinfer.api.served_model import ServedModel
from p2pinfer.errors import LocalError
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.text.chat_template import ChatTemplate

from .scripted import HERMES

SPEC = ModelSpec("owner/tiny", "ab" * 16, "llama", "float32", 8, 32, 512, 1024, 2, 16, 1000)
MODEL = ServedModel(SPEC, ApiConfig(max_new_tokens=500))
TOOLED = ServedModel(SPEC, ApiConfig(max_new_tokens=500), HERMES)
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
TEXT: dict[str, Any] = {"model": "owner/tiny", "prompt": "Hello"}


TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL: dict[str, Any] = {
    "id": "c1",
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": 2}'},
}


def plan(
    planner: Callable[[bytes, ServedModel], Plan | dict[str, Any]],
    wish: dict[str, Any],
    model: ServedModel = MODEL,
) -> Plan:
    planned = planner(json.dumps(wish).encode(), model)
    assert isinstance(planned, Plan)
    return planned


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"tools": [TOOL]}, "tools are not supported: this model has no chat template"),
        ({"tool_choice": "required"}, "tool_choice asks for a call, and there are no tools"),
        ({"functions": [{"name": "add"}]}, "functions is not supported: give tools"),
        ({"response_format": {"type": "xml"}}, "response_format must be of type text, json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format must be of type text, json_object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}},
            "schema must be a JSON schema",
        ),
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
        ({"messages": [{"role": "function", "content": "4"}]}, "a message is of a function; give tools"),
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
    ("tool", "says"),
    [
        ({"type": "web_search"}, "is no function"),
        ({"type": "function", "function": "add"}, "is no function"),
        ({"type": "function", "function": {}}, "has a name of other than 1 to 128 letters"),
        ({"type": "function", "function": {"name": "a b"}}, "has a name of other than 1 to 128 letters"),
        (
            {"type": "function", "function": {"name": "a", "parameters": 1}},
            "has parameters that are no JSON schema",
        ),
        ({"type": "function", "function": {"name": "a", "strict": "very"}}, "has a field 'strict' that is"),
        ({"type": "function", "function": {"name": "a", "more": 1}}, "has a field 'more'"),
        (TOOL, "has a name twice"),
    ],
)
def test_a_tool_with_a_fault_is_refused(tool: dict[str, Any], says: str) -> None:
    with pytest.raises(ApiError, match=f"a tool {says}"):
        plan(plan_chat, CHAT | {"tools": [TOOL, tool]}, TOOLED)


def test_tools_whose_calls_could_not_be_read_are_refused() -> None:
    model = ServedModel(SPEC, ApiConfig(), ChatTemplate({"default": "{{ tools | tojson }}"}, {}))
    with pytest.raises(ApiError, match="in a form whose calls are not read here"):
        plan(plan_chat, CHAT | {"tools": [TOOL]}, model)


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


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"max_tokens": None}, "max_tokens: Field required"),
        ({"temperature": 1.5}, "temperature is 1.5; it must be from 0 to 1"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers is not supported"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking is not supported: this model's"),
        ({"thinking": {"type": "deep"}}, "thinking.type must be"),
        ({"tool_choice": {"type": "any"}}, "tool_choice asks for a call, and there are no tools"),
        ({"tool_choice": {"type": "all"}}, "tool_choice must be of type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "the server runs none"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format must be of type json"),
        ({"output_config": {"style": 1}}, "output_config.style is not a field"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "send what is to be kept",
        ),
        ({"context_management": {"edits": 1}}, "send what is to be kept"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image' is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "a message is of a tool"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences takes up to 16"),
    ],
)
def test_what_is_not_honoured_of_messages_is_refused(wish: dict[str, Any], says: str) -> None:
    with pytest.raises(ApiError, match=says):
        plan(plan_messages, CHAT | {"max_tokens": 5} | wish)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"format": "xml"}, "format is 'xml'; it must be json or a schema"),
        ({"images": ["aGk="]}, "images is not supported"),
        ({"think": True}, "think is not supported: this prompt is no chat"),
        ({"think": "high"}, "think is not supported: this prompt is no chat"),
        ({"options": {"num_ctx": 4096}}, "num_ctx is 4096; the context of owner/tiny is 1024 tokens"),
        ({"options": {"mirostat": 2}}, "mirostat is not supported: use top_p"),
        ({"options": {"magic": 1}}, "options: .*magic"),
        ({"options": {"num_predict": 0}}, "num_predict is 0; it must be 1 or more"),
        ({"system": "Be brief."}, "system is not supported"),
        ({"suffix": "end"}, "suffix is not supported"),
    ],
)
def test_what_is_not_honoured_of_ollama_s_requests_is_refused(wish: dict[str, Any], says: str) -> None:
    with pytest.raises(ApiError, match=says):
        plan(plan_ollama_text, TEXT | wish)


def test_ollama_s_options_are_ours_by_other_names() -> None:
    options = {"num_predict": -1, "repeat_penalty": 1.5, "typical_p": 0.5, "stop": ["a"], "num_ctx": 1000}
    asked = plan(plan_ollama_text, TEXT | {"options": options | {"num_gpu": 99, "mirostat": 0}}).asked
    config = asked.config
    assert (asked.prompt, config.max_new_tokens, config.repetition_penalty) == ("Hello", 500, 1.5)
    assert (config.typical_p, config.stop) == (0.5, ("a",))
    chat = plan(plan_ollama_text, TEXT | {"system": "Be brief."}, TOOLED).asked
    assert chat.prompt == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"})
    assert plan(plan_ollama_text, TEXT | {"raw": True}, TOOLED).asked.prompt == "Hello"


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


def test_turns_of_one_side_are_one_turn_and_the_last_may_begin_the_answer() -> None:
    messages = [
        {"role": "user", "content": "One"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "two", "cache_control": {"type": "ephemeral"}}],
        },
        {"role": "assistant", "content": "So"},
    ]
    wish = {"messages": messages, "max_tokens": 5, "system": [{"type": "text", "text": "Be brief."}]}
    asked = plan(plan_messages, CHAT | wish).asked
    assert asked.prompt == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One\n\ntwo"},
        {"role": "assistant", "content": "So"},
    )
    assert asked.continues
    assert not plan(plan_messages, CHAT | {"max_tokens": 5}).asked.continues


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
