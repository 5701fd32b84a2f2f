"""Requests of Anthropic's dialect as they are understood: what is honoured, and why the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest

from p2pinfer.api.anthropic.messages import plan_messages
from p2pinfer.api.errors import ApiError

from .plans import CHAT, plan


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
