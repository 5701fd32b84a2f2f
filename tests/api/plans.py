"""Requests as they are planned, and the model that is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from p2pinfer.api.config import ApiConfig
from p2pinfer.api.exchange import Plan
from p2pinfer.api.served_model import ServedModel
from p2pinfer.models.checkpoint.spec import ModelSpec

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
    """What is planned for a request; fails if it is answered at once."""
    planned = planner(json.dumps(wish).encode(), model)
    assert isinstance(planned, Plan)
    return planned
