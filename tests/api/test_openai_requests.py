"""Requests of OpenAI's dialect as they are understood: what is honoured, and why the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest

from p2pinfer.api.answers import Asked
from p2pinfer.api.config import ApiConfig
from p2pinfer.api.errors import ApiError
from p2pinfer.api.openai.chat import plan_chat
from p2pinfer.api.openai.completions import plan_completion
from p2pinfer.api.served_model import ServedModel
from p2pinfer.errors import LocalError
from p2pinfer.models.text.chat_template import ChatTemplate

from .plans import CHAT, SPEC, TEXT, TOOL, TOOLED, plan


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
