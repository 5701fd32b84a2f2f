"""Chat templates: how a checkpoint wants a conversation written as one text.

A template is a Jinja program that comes with the model, and so from a stranger. It is rendered in a process
of its own (chat_renderer.py) with bounds on time, memory and size, and as transformers' `apply_chat_template`
renders it: the same settings, filters, functions and variables.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from p2pinfer.errors import ChatTemplateError, CheckpointError
from p2pinfer.models.checkpoint.spec import read_json
from p2pinfer.text_files import read_text

Message: TypeAlias = Mapping[str, Any]  # "role", and "content" or what the template knows besides

FILE: Final = "chat_template.jinja"
FOLDER: Final = "additional_chat_templates"
_RENDERER: Final = Path(__file__).with_name("chat_renderer.py")
_PATIENCE_S: Final = 10.0
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")  # names of one thing; the first one counts
_KEPT: Final = ("TZ", "LANG", "LC_ALL", "LC_TIME", "SYSTEMROOT")  # of the environment: what dates depend on


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Conversation as one text, special tokens included: none are put around it when it is tokenized."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """Template of one checkpoint.

    Attributes:
        sources: Templates by name; `default` is there, and often `tool_use`.
        special_tokens: Text of the special tokens by role, such as `bos_token`.
    """

    sources: Mapping[str, str]
    special_tokens: Mapping[str, str]

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> ChatPrompt:
        """A conversation as a prompt. Blocks for a tenth of a second, in which another process runs.

        Args:
            messages: The conversation so far; values that are None count as absent.
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: End with the beginning of an answer.
            variables: Others that the template knows, such as `enable_thinking`.

        Raises:
            ChatTemplateError: The template refuses these messages, is broken, or takes too long.
        """
        known: dict[str, Any] = {
            "documents": None,
            **self.special_tokens,
            **variables,
            "messages": [_plain(message) for message in messages],
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        try:
            request = json.dumps({"template": self.sources[name], "variables": known})
        except (TypeError, ValueError, RecursionError) as exc:
            raise ChatTemplateError(f"these messages cannot be written as JSON: {exc}") from exc
        return ChatPrompt(_answer_to(request))


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """Chat template of a model folder; None if it has none.

    A file of its own counts before what tokenizer_config.json says.

    Raises:
        CheckpointError: A file cannot be read.
    """
    settings = read_json(folder / "tokenizer_config.json") or {}
    sources = _listed(settings.get("chat_template"))
    for path in (folder / FILE, *sorted((folder / FOLDER).glob("*.jinja"))):
        if path.is_file():
            try:
                sources["default" if path.name == FILE else path.stem] = read_text(path)
            except (OSError, ValueError) as exc:
                raise CheckpointError(f"{path} cannot be read: {exc}; fetch it again") from exc
    if "default" not in sources:
        return None
    if not isinstance(settings.get("added_tokens_decoder"), dict):  # as in added_tokens.py
        settings |= read_json(folder / "special_tokens_map.json") or {}
    return ChatTemplate(sources, _special_tokens(settings))


def _listed(value: Any) -> dict[str, str]:
    """Templates by name, of what tokenizer_config.json has: one text, or a list of named ones."""
    if isinstance(value, str):
        return {"default": value}
    named: list[Any] = value if isinstance(value, list) else []
    return {
        each["name"]: each["template"]
        for each in named
        if isinstance(each, dict)
        and isinstance(each.get("name"), str)
        and isinstance(each.get("template"), str)
    }


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Texts of all that is called a token, written as text or with its attributes."""
    texts: dict[str, Any] = {name: settings[name] for name in settings if name.endswith("_token")}
    texts |= {
        name: text["content"] for name, text in texts.items() if isinstance(text, dict) and "content" in text
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _plain(message: Message) -> dict[str, Any]:
    """A message without what is None, and with its reasoning by the names that templates read."""
    plain = {name: value for name, value in message.items() if value is not None}
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _answer_to(request: str) -> str:
    """The renderer's text."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_RENDERER)],
            input=request.encode("utf-8", "replace"),
            capture_output=True,
            timeout=_PATIENCE_S,
            env={name: os.environ[name] for name in _KEPT if name in os.environ},
        )
    except subprocess.TimeoutExpired as exc:
        raise ChatTemplateError(_BROKEN.format(f"it did not end within {_PATIENCE_S:g} s")) from exc
    except OSError as exc:
        raise ChatTemplateError(f"the process for the chat template could not be started: {exc}") from exc
    try:
        answer: dict[str, str] = json.loads(done.stdout)
    except ValueError:
        raise ChatTemplateError(_BROKEN.format("it took more time or memory than it may")) from None
    if "refused" in answer:
        raise ChatTemplateError(f"the model's chat template refuses these messages: {answer['refused']}")
    if "broken" in answer:
        raise ChatTemplateError(_BROKEN.format(answer["broken"]))
    return answer["text"]


_BROKEN: Final = "the model's chat template cannot be used: {}; --raw sends the prompt as it is"
