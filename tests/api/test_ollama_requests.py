"""Requests of Ollama's dialect as they are understood: what is honoured, and why the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest

from p2pinfer.api.errors import ApiError
from p2pinfer.api.ollama.answering import plan_text

from .plans import TEXT, TOOLED, plan


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
        plan(plan_text, TEXT | wish)


def test_ollama_s_options_are_ours_by_other_names() -> None:
    options = {"num_predict": -1, "repeat_penalty": 1.5, "typical_p": 0.5, "stop": ["a"], "num_ctx": 1000}
    asked = plan(plan_text, TEXT | {"options": options | {"num_gpu": 99, "mirostat": 0}}).asked
    config = asked.config
    assert (asked.prompt, config.max_new_tokens, config.repetition_penalty) == ("Hello", 500, 1.5)
    assert (config.typical_p, config.stop) == (0.5, ("a",))
    chat = plan(plan_text, TEXT | {"system": "Be brief."}, TOOLED).asked
    assert chat.prompt == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"})
    assert plan(plan_text, TEXT | {"raw": True}, TOOLED).asked.prompt == "Hello"
