"""Examples to learn from: lines of JSON, as tokens and what is to be predicted of them.

A line is an object with one of these:

    {"text": "..."}                          every token is predicted
    {"prompt": "...", "completion": "..."}   the completion is
    {"messages": [{"role": ..., "content": ...}, ...]}   the last message is, by the model's chat template
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from p2pinfer.errors import ConfigError
from p2pinfer.models.learning.ends import IGNORED
from p2pinfer.models.text.chat_template import ChatTemplate
from p2pinfer.models.text.text import Tokenizer
from p2pinfer.text_files import read_text

_KINDS = ("text", "prompt and completion", "messages")


@dataclass(frozen=True, slots=True)
class Example:
    """A text to learn from.

    Attributes:
        token_ids: Its tokens.
        labels: For each token the one that follows it, or -100 where nothing is to be learnt.
    """

    token_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def targets(self) -> int:
        """Number of tokens that are predicted."""
        return sum(label != IGNORED for label in self.labels)

    def first(self, tokens: int) -> Example:
        """Its first tokens, of which the last one predicts nothing."""
        if tokens >= len(self.token_ids):
            return self
        return Example(self.token_ids[:tokens], (*self.labels[: tokens - 1], IGNORED))


@dataclass(frozen=True, slots=True)
class DataFile:
    """Lines of a file.

    Attributes:
        lines: The objects, each with the number of its line.
        digest: SHA-256 of the file, by which a resumed training knows that it is the same.
    """

    path: Path
    lines: tuple[tuple[int, Mapping[str, Any]], ...]
    digest: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """Examples of a file, and what became of the others.

    Attributes:
        cut: Number of examples that were longer than they may be.
        empty: Number of lines that had nothing to predict, after the cut.
    """

    examples: tuple[Example, ...]
    cut: int
    empty: int


def read_data(path: Path) -> DataFile:
    """The lines of a file; empty ones are passed over.

    Raises:
        ConfigError: It cannot be read, or a line is no example.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path} cannot be read: {reason}") from exc
    lines: list[tuple[int, Mapping[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            lines.append((number, _checked(path, number, line)))
    if not lines:
        raise ConfigError(f'{path} has no examples; write one a line, such as {{"text": "..."}}')
    return DataFile(path, tuple(lines), hashlib.sha256(text.encode()).hexdigest())


def prepare(
    data: DataFile,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    max_tokens: int,
    on_example: Callable[[int], None] = lambda count: None,
) -> Prepared:
    """The examples of a file, cut to `max_tokens`. Chats take a tenth of a second each.

    Raises:
        ConfigError: There are chats and the model has no template, or nothing is left to learn.
        ChatTemplateError: The template refuses a chat.
    """
    examples: list[Example] = []
    cut = 0
    for count, (number, line) in enumerate(data.lines):
        on_example(count)
        try:
            whole = make_example(line, tokenizer, template)
        except ConfigError as exc:
            raise ConfigError(f"{data.path}, line {number}: {exc}") from exc
        cut += len(whole.token_ids) > max_tokens
        made = whole.first(max_tokens)
        if made.targets:
            examples.append(made)
    if not examples:
        raise ConfigError(
            f"{data.path}: nothing is left to predict in the first {max_tokens} tokens of any example; "
            "raise tune.max_tokens, or shorten the prompts"
        )
    return Prepared(tuple(examples), cut, len(data.lines) - len(examples))


def make_example(line: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None) -> Example:
    """An example of an object as a line has it.

    Raises:
        ConfigError: It is a chat, and the model has no template.
        ChatTemplateError: The template refuses the chat.
    """
    token_ids, known = _tokens_of(line, tokenizer, template)
    following = [IGNORED if at < known else token for at, token in enumerate(token_ids)][1:]
    return Example(tuple(token_ids), (*following, IGNORED) if token_ids else ())


def _checked(path: Path, number: int, line: str) -> Mapping[str, Any]:
    where = f"{path}, line {number}"
    try:
        found: object = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{where} is no JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise ConfigError(f"{where} is no JSON object; write one with {', or '.join(_KINDS)}")
    told = cast("dict[str, Any]", found)
    if "messages" in told:
        _check_messages(where, told["messages"])
        return told
    for names in (("text",), ("prompt", "completion")):
        if all(isinstance(told.get(name), str) for name in names):
            return told
    raise ConfigError(f"{where} has no {', no '.join(_KINDS)}; it has {', '.join(sorted(told)) or 'nothing'}")


def _check_messages(where: str, messages: object) -> None:
    said = cast("Sequence[Any]", messages) if isinstance(messages, list) else ()
    for message in said:
        if not isinstance(message, dict) or not isinstance(cast("dict[str, Any]", message).get("role"), str):
            raise ConfigError(f'{where}: a message is an object such as {{"role": "user", "content": "..."}}')
    if len(said) < 2:
        raise ConfigError(f"{where}: a chat has two messages or more, and the last one is learnt")


def _tokens_of(
    line: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[list[int], int]:
    """Tokens of an example, and how many of them are given."""
    if "messages" in line:
        if template is None:
            raise ConfigError("the model has no chat template; write prompt and completion instead")
        messages = cast("list[Mapping[str, Any]]", line["messages"])
        asked = template.render(messages[:-1]).text
        told = template.render(messages, add_generation_prompt=False).text
        whole = tokenizer.encode(told, add_special_tokens=False)
        return whole, _shared(whole, tokenizer.encode(asked, add_special_tokens=False))
    # The first of several end tokens is that of texts; the others end a turn.
    end = sorted(tokenizer.eos_ids)[:1]
    if "text" in line:
        whole = tokenizer.encode(line["text"])
        return (whole if whole[-1:] == end else whole + end), 1
    whole = tokenizer.encode(line["prompt"] + line["completion"])
    known = _shared(whole, tokenizer.encode(line["prompt"]))
    return (whole if whole[-1:] == end else whole + end), known


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of first tokens that both have: a token may reach over the end of a prompt."""
    for index, pair in enumerate(zip(one, other, strict=False)):
        if pair[0] != pair[1]:
            return index
    return min(len(one), len(other))
