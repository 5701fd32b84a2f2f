"""Prompt of a generation: an argument, or standard input in any encoding that shells write."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from p2pinfer.cli.output.terminal import note, read_stdin
from p2pinfer.errors import ConfigError
from p2pinfer.text_files import decode_text

if TYPE_CHECKING:
    from p2pinfer.models.text.chat_template import ChatPrompt, ChatTemplate

MAX_BYTES: Final = 64 << 20  # ten million tokens and more: no model's context is so long
_MARK: Final = "\ufeff"  # a byte order mark: `generate "$(cat prompt.txt)"` hands it over


def take_prompt(given: str | None, *, quiet: bool = False) -> str | None:
    """The prompt that was given, or with - what standard input holds; without any, what is piped in.

    Returns:
        None if there is none.

    Raises:
        ConfigError: What standard input holds is no text, or too much of it.
        LocalError: It cannot be read.
    """
    if given == "-":
        if sys.stdin is not None and sys.stdin.isatty() and not quiet:
            note("type the prompt; Ctrl-D on a line of its own ends it")
        return _from_stdin()
    if given is None:
        return (_from_stdin() or None) if _holds_a_prompt() else None
    if not quiet and _unread_bytes():
        note("standard input is not read, because PROMPT is given; use - as PROMPT to read it")
    return given.removeprefix(_MARK)


async def as_prompt(
    template: ChatTemplate | None, text: str, as_chat: bool | None, system: str | None
) -> str | ChatPrompt:
    """Prompt of a text: the text itself, or a chat that begins with it.

    Args:
        as_chat: As a chat or not; None: as the model has a template or not.
        system: System message of the chat.

    Raises:
        ConfigError: A chat is asked for, and the model has no template.
        ChatTemplateError: The template cannot be used.
    """
    if system is not None and as_chat is False:
        raise ConfigError("--system is a message of a chat, and --raw sends no chat; give one of them")
    if template is None:
        if as_chat or system is not None:
            raise ConfigError(
                "the model has no chat template, so it takes no chat; leave out --chat and --system"
            )
        return text
    if as_chat is False:
        return text
    import trio

    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return await trio.to_thread.run_sync(template.render, messages)


def dash_hint(words: Sequence[str], options: Iterable[str]) -> str:
    """Advice on a prompt that was taken for options, such as "-5 degrees"; empty if there is none."""
    known = set(options)
    for word in words[: words.index("--")] if "--" in words else words:
        is_text = " " in word or (len(word) > 1 and word[0] == "-" != word[1])
        if word.startswith("-") and word not in known and is_text:
            return f"Put -- before a prompt that begins with a dash: p2pinfer generate -- {shlex.quote(word)}"
    return ""


def _from_stdin() -> str:
    """Standard input as text, with line ends as models know them, less the last, which editors add."""
    content = read_stdin(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ConfigError(f"the prompt on standard input is longer than {MAX_BYTES >> 20} MiB; shorten it")
    try:
        return decode_text(content).replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"the prompt on standard input is not UTF-8 text: {exc}") from exc


def _holds_a_prompt() -> bool:
    """True if standard input is a pipe or a file, and not a terminal or /dev/null."""
    if sys.stdin is None:
        return False
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # no file at all, as in a test or a notebook
        return False
    return stat.S_ISFIFO(kind) or stat.S_ISREG(kind) or stat.S_ISSOCK(kind)


def _unread_bytes() -> int:
    """Number of bytes that wait on standard input; 0 where that cannot be told."""
    try:
        import fcntl
        import termios

        if not stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):
            return 0
        return int.from_bytes(fcntl.ioctl(sys.stdin.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder)
    except (ImportError, OSError, ValueError, AttributeError):
        return 0
