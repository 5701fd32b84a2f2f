"""Conversation of `p2pinfer chat`: what was said, and what a typed line asks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias

from p2pinfer.errors import LocalError
from p2pinfer.folders import write_private
from p2pinfer.suggestions import suggest
from p2pinfer.text_files import is_text

Kind: TypeAlias = Literal[
    "ask", "system", "model", "route", "stats", "save", "retry", "clear", "help", "quit", "unknown"
]
HELP: Final = """\
/system TEXT    set the system message; alone: remove it
/model MODEL    talk to another model
/route          list the hops of the last answer
/stats          show what the last answer took
/save FILE      write the conversation as JSON
/retry          answer the last question again
/clear          forget the conversation
/quit           end, as Ctrl-D does
A line that ends with \\ goes on in the next one. \"\"\" begins and ends a message of several lines.
Ctrl-C stops an answer."""
_COMMANDS: Final[tuple[Kind, ...]] = (
    "system", "model", "route", "stats", "save", "retry", "clear", "help", "quit"
)  # fmt: skip
_OTHER_NAMES: Final[dict[str, Kind]] = {"bye": "quit", "exit": "quit", "?": "help", "regenerate": "retry"}
_FENCE: Final = '"""'


@dataclass(frozen=True, slots=True)
class Typed:
    """A message or a command. `text` is the message, or what stands behind the command."""

    kind: Kind
    text: str = ""


def read_typed(next_line: Callable[[bool], str | None]) -> Typed | None:
    """The next message or command; None at the end of input.

    Args:
        next_line: Gives a line without its end, or None; told True if it goes on with a message.
    """
    while (line := next_line(False)) is not None:
        if line.strip().startswith("/"):
            return parse_command(line.strip())
        text = _rest(line, next_line)
        if text.strip():
            return Typed("ask", text)
    return None


def parse_command(line: str) -> Typed:
    """The command in a line that begins with a slash."""
    name, _, rest = line[1:].partition(" ")
    kind = _OTHER_NAMES.get(name, name)
    for known in _COMMANDS:
        if known == kind:
            return Typed(known, rest.strip())
    nearest = suggest(name, _COMMANDS)
    return Typed("unknown", f"there is no /{name[:50]}{nearest}; /help lists the commands")


def _rest(line: str, next_line: Callable[[bool], str | None]) -> str:
    """The whole message that begins with `line`."""
    lines: list[str] = []
    if line.strip().startswith(_FENCE):
        more: str | None = line.strip().removeprefix(_FENCE)
        while more is not None and not more.rstrip().endswith(_FENCE):
            lines.append(more)
            more = next_line(True)
        if more is not None:
            lines.append(more.rstrip().removesuffix(_FENCE))
        return "\n".join(lines).strip("\n")
    while line.endswith("\\"):
        lines.append(line[:-1])
        if (more := next_line(True)) is None:
            break
        line = more
    else:
        lines.append(line)
    return "\n".join(lines)


@dataclass(slots=True)
class Conversation:
    """Messages so far.

    Attributes:
        system: The system message; empty if there is none.
        turns: Messages of the user and the model by turns; the last one is a question while it is answered.
    """

    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, as chat templates know them."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]

    def ask(self, text: str) -> None:
        """Add a question."""
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Add the answer to it, or what there is of it."""
        self.turns.append({"role": "assistant", "content": text})

    def take_back(self) -> bool:
        """Take the last answer back, so that its question stands; False if there is none."""
        if self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        return bool(self.turns)

    def drop_question(self) -> None:
        """Take back a question that was not answered."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    def save(self, name: str, model: str) -> Path:
        """Write it as JSON, for its owner alone.

        Raises:
            LocalError: It cannot be written.
        """
        path = Path(name).expanduser()
        document = json.dumps({"model": model, "messages": self.messages}, ensure_ascii=False, indent=2)
        try:
            write_private(path, document.encode("utf-8") + b"\n")
        except (OSError, ValueError) as exc:
            raise LocalError(f"{path} cannot be written: {exc}") from exc
        return path


def as_text(messages: Sequence[dict[str, str]]) -> str:
    """A conversation for a model without a chat template, which continues what was said."""
    return "\n\n".join(message["content"] for message in messages)


def clean(text: str) -> str:
    """A typed text with U+FFFD for what is none, such as a byte that is no UTF-8."""
    return text if is_text(text) else text.encode("utf-8", "replace").decode("utf-8")
