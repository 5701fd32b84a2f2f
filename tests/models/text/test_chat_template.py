"""Chat templates, rendered as transformers' `apply_chat_template` renders them, and hostile ones stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import transformers

from p2pinfer.errors import ChatTemplateError, CheckpointError
from p2pinfer.models.text.chat_template import ChatTemplate, load_chat_template

from .test_added_tokens import write

SETTINGS = {
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False},
    "pad_token": None,
    "image_token": "<image>",
}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "  You are a pirate. <&> \n"},
    {"role": "user", "content": "Héllo, 'you'\nthere"},
    {"role": "assistant", "content": "<think>hm</think>\n\nAye!  ", "reasoning": "because"},
    {"role": "user", "content": "What is 2 + 2?", "name": None},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": 'Adds "two" numbers — really.',
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": ["number", "null"]}},
        },
    },
}
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Add 2 and 3"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3.5}}}
        ],
    },
    {"role": "tool", "name": "add", "tool_call_id": "c1", "content": "5.5"},
]
# Written for these tests; between them they use what published templates use.
TEMPLATES = {
    path.stem: path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("chat_templates/*"))
}
TOOLS = [name for name in TEMPLATES if name.startswith("tools-")]
PLAIN = [name for name in TEMPLATES if name not in TOOLS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, ["<s>"], tokenizer_config=SETTINGS)


def rendered_by_transformers(folder: Path, template: str, messages: Any, **options: Any) -> str:
    tokenizers: Any = transformers.PreTrainedTokenizerFast
    tokenizer: Any = tokenizers.from_pretrained(folder)
    options = {"add_generation_prompt": True, **options}
    text: str = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    return text


@pytest.mark.parametrize("name", PLAIN)
def test_a_conversation_is_written_as_by_transformers(name: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    template = load_chat_template(folder)
    assert template is not None
    variables: dict[str, Any] = {"enable_thinking": False}
    expected = rendered_by_transformers(folder, TEMPLATES[name], CHAT, **variables)
    assert template.render(CHAT, **variables).text == expected


@pytest.mark.parametrize("name", TOOLS)
def test_tools_are_written_as_by_transformers(name: str, folder: Path) -> None:
    template = ChatTemplate({"default": "{{ 1 / 0 }}", "tool_use": TEMPLATES[name]}, {})
    expected = rendered_by_transformers(folder, TEMPLATES[name], CALLS, tools=[TOOL])
    assert template.render(CALLS, tools=[TOOL]).text == expected


def test_a_conversation_that_goes_on_has_no_beginning_of_an_answer(folder: Path) -> None:
    template = ChatTemplate({"default": TEMPLATES["markers"]}, {})
    expected = rendered_by_transformers(folder, TEMPLATES["markers"], CHAT, add_generation_prompt=False)
    assert template.render(CHAT, add_generation_prompt=False).text == expected


def test_todays_date_is_todays() -> None:
    template = ChatTemplate({"default": "{{ strftime_now('%d %b %Y') }}"}, {})
    assert re.fullmatch(r"\d\d \w{3} \d{4}", template.render(CHAT).text)


@pytest.mark.parametrize(
    ("settings", "files", "expected"),
    [
        ({}, {}, None),
        ({"chat_template": None}, {}, None),
        ({"chat_template": "old"}, {}, {"default": "old"}),
        ({"chat_template": "old"}, {"chat_template.jinja": "new"}, {"default": "new"}),
        (
            {
                "chat_template": [
                    {"name": "default", "template": "a"},
                    {"name": "rag", "template": "b"},
                    {"name": 1},
                ]
            },
            {},
            {"default": "a", "rag": "b"},
        ),
        (
            {},
            {"chat_template.jinja": "a", "additional_chat_templates/tool_use.jinja": "t"},
            {"default": "a", "tool_use": "t"},
        ),
        ({}, {"additional_chat_templates/tool_use.jinja": "t"}, None),
    ],
)
def test_where_templates_lie(
    settings: dict[str, Any], files: dict[str, str], expected: dict[str, str] | None, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    template = load_chat_template(tmp_path)
    assert (template and dict(template.sources)) == expected


def test_special_tokens_of_older_files_count_unless_the_newer_one_lists_all(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("x")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<old>"}}')
    cases: list[tuple[dict[str, Any], str]] = [
        ({"bos_token": "<s>"}, "<old>"),
        ({"bos_token": "<s>", "added_tokens_decoder": {}}, "<s>"),
    ]
    for settings, expected in cases:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        template = load_chat_template(tmp_path)
        assert template is not None
        assert template.special_tokens == {"bos_token": expected}


def test_a_template_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        load_chat_template(tmp_path)


def test_a_template_may_refuse() -> None:
    template = ChatTemplate({"default": "{{ raise_exception('roles must alternate') }}"}, {})
    with pytest.raises(ChatTemplateError, match="refuses these messages: roles must alternate"):
        template.render(CHAT)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages[9].content.x }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError|UndefinedError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end|more time or memory"),
        ("{{ 'x' * 999999999 }}", "too much memory|more time or memory"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "more time or memory|did not end within 10 s",
        ),
        ("{{ 'x' * 20000000 }}", "too long"),
    ],
)
def test_a_hostile_template_reaches_nothing_and_is_stopped(source: str, said: str) -> None:
    with pytest.raises(ChatTemplateError, match=f"(?s)cannot be used: .*({said}).*--raw"):
        ChatTemplate({"default": source}, {}).render(CHAT)


def renderers() -> set[int]:
    """Processes of this one that render templates."""
    children = psutil.Process().children()
    return {child.pid for child in children if any("chat_renderer" in word for word in child.cmdline())}


def test_one_process_renders_until_its_template_is_dropped_and_then_ends() -> None:
    before = renderers()
    template = ChatTemplate({"default": "{{ messages[0].content }}", "tool_use": "tools"}, {})
    template.warm_up()
    (process,) = renderers() - before
    assert [template.render([{"content": text}]).text for text in "abc"] == ["a", "b", "c"]
    assert template.render(CHAT, tools=[]).text == "tools"
    assert renderers() - before == {process}
    del template
    assert not renderers() - before


def test_conversations_are_not_mixed_up_and_leave_nothing_to_the_next() -> None:
    source = (
        "{% set ns = namespace(seen=ns.seen if ns is defined else '') %}"
        "{% for message in messages %}{% set ns.seen = ns.seen ~ message.content %}{% endfor %}"
        "{% macro seen() %}{{ ns.seen }}{% endmacro %}{{ ns.seen }}"
    )
    template = ChatTemplate({"default": source}, {})
    chats = [[{"content": f"chat {index} "}] * (index + 1) for index in range(24)]
    with ThreadPoolExecutor(8) as threads:
        texts = [prompt.text for prompt in threads.map(template.render, chats)]
    assert texts == [f"chat {index} " * (index + 1) for index in range(24)]


def test_a_process_that_was_stopped_is_replaced() -> None:
    source = (
        "{% if messages[1] %}{{ 'x' * (999999999 * messages|length) }}{% endif %}{{ messages[0].content }}"
    )
    template = ChatTemplate({"default": source}, {})
    for _ in range(2):
        assert template.render(CHAT[3:]).text == "What is 2 + 2?"
        with pytest.raises(ChatTemplateError, match="memory"):
            template.render(CHAT)
    for pid in renderers():  # as a system does that is short of memory
        psutil.Process(pid).kill()
        psutil.Process(pid).wait()
    assert template.render(CHAT[3:]).text == "What is 2 + 2?"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_has_a_process_of_its_own(tmp_path: Path) -> None:
    """Else two programs would read each other's conversations."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from p2pinfer.models.text.chat_template import ChatTemplate\n"
        "template = ChatTemplate({'default': '{{ messages[0].content }}'}, {})\n"
        "template.warm_up()\n"
        "child = os.fork()\n"
        "name = 'parent' if child else 'child'\n"
        "for _ in range(20):\n"
        "    assert template.render([{'content': name}]).text == name\n"
        "if child:\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "    assert template.render([{'content': 'still there'}]).text == 'still there'\n"
    )
    subprocess.run([sys.executable, script], check=True, timeout=60)


def test_messages_that_are_no_json_are_told() -> None:
    with pytest.raises(ChatTemplateError, match="cannot be written as JSON"):
        ChatTemplate({"default": ""}, {}).render([{"role": "user", "content": b"bytes"}])
