"""Chat templates: how a checkpoint wants a conversation written as one text.

A template is a Jinja program that comes with the model, and so from a stranger. It is rendered in a process
of its own (renderer_process.py) with bounds on time, memory and size, and as transformers'
`apply_chat_template` renders it: the same settings, filters, functions and variables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from p2pinfer.errors import ChatTemplateError, CheckpointError
from p2pinfer.models.checkpoint.spec import read_json
from p2pinfer.text_files import read_text

from .renderer_process import RendererProcess

Message: TypeAlias = Mapping[str, Any]  # "role", and "content" or what the template knows besides

FILE: Final = "chat_template.jinja"
FOLDER: Final = "additional_chat_templates"
_PATIENCE_S: Final = 10.0
_HERE: Final = "CONTINUE_FINAL_MESSAGE_TAG "  # where a message is to be continued, as in transformers
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")  # names of one thing; the first one counts


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
    _renderer: RendererProcess = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_renderer", RendererProcess(self.sources, _PATIENCE_S))

    def warm_up(self) -> None:
        """Start the process that renders, so that the first conversation need not wait for it. Blocks."""
        with suppress(ChatTemplateError):  # many templates refuse a conversation without a word
            self.render([])

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> ChatPrompt:
        """A conversation as a prompt. Blocks for about a millisecond, in which another process renders.

        The first call starts that process, which takes a tenth of a second.

        Args:
            messages: The conversation so far; values that are None count as absent.
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: End with the beginning of an answer.
            continue_final_message: End within the last message, which has begun what is to be continued.
            variables: Others that the template knows, such as `enable_thinking`.

        Raises:
            ChatTemplateError: The template refuses these messages, is broken, or takes too long.
        """
        plain = [_plain(message) for message in messages]
        if continue_final_message and plain:
            plain[-1]["content"] = f"{plain[-1].get('content', '')}{_HERE}"
        known: dict[str, Any] = {
            "documents": None,
            **self.special_tokens,
            **variables,
            "messages": plain,
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        try:
            request = json.dumps({"template": name, "variables": known})
        except (TypeError, ValueError, RecursionError) as exc:
            raise ChatTemplateError(f"these messages cannot be written as JSON: {exc}") from exc
        answer = self._renderer.ask(request)
        if "refused" in answer:
            raise ChatTemplateError(f"the model's chat template refuses these messages: {answer['refused']}")
        if "broken" in answer:
            raise ChatTemplateError(
                f"the model's chat template cannot be used: {answer['broken']}; "
                "--raw sends the prompt as it is"
            )
        return ChatPrompt(_cut(answer["text"]) if continue_final_message else answer["text"])


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


def _cut(text: str) -> str:
    """A conversation up to where its last message is to be continued."""
    if (at := text.rfind(_HERE.strip())) < 0:
        raise ChatTemplateError("the model's chat template leaves out the message that is to be continued")
    return text[:at] if text.startswith(_HERE, at) else text[:at].rstrip()  # the template strips messages


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
