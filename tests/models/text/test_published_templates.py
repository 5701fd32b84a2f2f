"""Chat templates of published models, rendered as transformers' `apply_chat_template` renders them.

Those that the package trl carries. `make templates` installs it, without what it needs to be imported.
"""

from __future__ import annotations

from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from p2pinfer.errors import ChatTemplateError
from p2pinfer.models.text.chat_template import ChatTemplate

from .test_added_tokens import write
from .test_chat_template import CALLS, CHAT, SETTINGS, TOOL, rendered_by_transformers

pytestmark = pytest.mark.slow
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "a chat with a system prompt": (CHAT, {}),
    "a chat": (CHAT[1:], {}),
    "a chat without thinking": (CHAT[1:], {"enable_thinking": False}),
    "one question": (CHAT[3:], {}),
    "a conversation that is over": (CHAT[1:3], {"add_generation_prompt": False}),
    "tools": (CHAT[3:], {"tools": [TOOL]}),
    "tools and a system prompt": (CHAT, {"tools": [TOOL]}),
    "a call and its result": (CALLS, {"tools": [TOOL]}),
}


def templates() -> dict[str, str]:
    """Sources by name; none without trl."""
    found = find_spec("trl")
    if found is None or found.origin is None:
        return {}
    folder = Path(found.origin).parent / "chat_templates"
    return {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.jinja"))}


PUBLISHED = templates()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, ["<s>"], tokenizer_config=SETTINGS)


@pytest.mark.skipif(not PUBLISHED, reason="trl; see `make templates`")
@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_written_as_by_transformers(name: str, folder: Path) -> None:
    source = PUBLISHED[name]
    special = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}
    template, written = ChatTemplate({"default": source}, special), 0
    for kind, (messages, options) in CONVERSATIONS.items():
        try:
            expected = rendered_by_transformers(folder, source, messages, **options)
        except Exception:  # roles that it does not take, say; and then it takes none here either
            with pytest.raises(ChatTemplateError):
                template.render(messages, **options)
            continue
        day = datetime.now().day
        text = template.render(messages, **options).text
        assert text == expected or datetime.now().day != day, kind
        written += 1
    assert written > 1
