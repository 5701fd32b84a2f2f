"""`p2pinfer chat`: what typed lines mean, and a conversation with two real node processes."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from p2pinfer.cli.app import run
from p2pinfer.cli.commands.conversation import Conversation, Typed, as_text, clean, read_typed
from p2pinfer.cli.output.typed_lines import TypedLines
from p2pinfer.errors import LocalError


def typed(*lines: str) -> list[Typed]:
    """All that these lines ask for."""
    left = list(lines)

    def next_line(_: bool) -> str | None:
        return left.pop(0) if left else None

    asked: list[Typed] = []
    while (each := read_typed(next_line)) is not None:
        asked.append(each)
    return asked


def test_lines_are_messages_or_commands() -> None:
    assert typed("Hello", "", "  ", "/system Be brief. ", "/retry", "/bye", "1 / 2") == [
        Typed("ask", "Hello"),
        Typed("system", "Be brief."),
        Typed("retry"),
        Typed("quit"),
        Typed("ask", "1 / 2"),
    ]


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["one \\", "two\\", "three"], "one \ntwo\nthree"),
        (["one\\"], "one"),
        (['"""', "one", "", " two", '"""'], "one\n\n two"),
        (['"""one', 'two"""'], "one\ntwo"),
        (['"""one"""'], "one"),
        (['"""one', "/two"], "one\n/two"),
    ],
)
def test_a_message_may_have_several_lines(lines: list[str], text: str) -> None:
    assert typed(*lines) == [Typed("ask", text)]


def test_a_command_that_is_not_there_has_a_neighbour() -> None:
    (asked,) = typed("/rety")
    assert asked == Typed("unknown", "there is no /rety; did you mean 'retry'?; /help lists the commands")


def test_a_conversation_remembers_takes_back_and_is_saved(tmp_path: Path) -> None:
    talk = Conversation("Be brief.")
    assert not talk.take_back()
    talk.ask("One?")
    talk.answer("1")
    talk.ask("Two?")
    talk.drop_question()
    assert as_text(talk.messages) == "Be brief.\n\nOne?\n\n1"
    assert talk.take_back()
    assert talk.turns == [{"role": "user", "content": "One?"}]
    path = talk.save(str(tmp_path / "talk.json"), "tiny")
    assert json.loads(path.read_text("utf-8")) == {"model": "tiny", "messages": talk.messages}
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(LocalError, match="cannot be written"):
        talk.save(str(tmp_path), "tiny")
    assert clean("a\udc80b") == "a?b"


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Has standard input hold these bytes, and end."""

    def typing(content: bytes) -> None:
        read, write = os.pipe()
        with os.fdopen(write, "wb") as file:
            file.write(content)
        monkeypatch.setattr(sys, "stdin", os.fdopen(read, encoding="utf-8"))

    return typing


def test_lines_are_read_as_they_were_written(type_in: Callable[[bytes], None]) -> None:
    type_in(b"one\r\n\n\xff\nlast")
    lines = TypedLines()
    assert [lines.next(False) for _ in range(5)] == ["one", "", "\ufffd", "last", None]
    sys.stdin.close()


@pytest.mark.slow
def test_a_conversation_goes_on_where_it_was(
    swarm_address: str, type_in: Callable[[bytes], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "talk.json"
    type_in(
        b"/route\nOnce upon a time\n/route\n/stats\n/retry\nThen\n/model no/such/folder\n"
        + b"/save "
        + os.fsencode(saved)
        + b"\n/stay\n/system Be kind.\n/clear\n/retry\n/help\n"
    )
    assert run(["chat", "--bootstrap", swarm_address, "--max-new-tokens", "8"]) == 0
    text, said = capsys.readouterr()
    sys.stdin.close()
    first, again, then = text.splitlines()
    assert first == again
    assert first.startswith(", there was a little girl")
    messages = json.loads(saved.read_text("utf-8"))["messages"]
    assert messages == [
        {"role": "user", "content": "Once upon a time"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Then"},
        {"role": "assistant", "content": then},
    ]
    for line in (
        "talking to tiny-stories",
        "it continues what was said",
        "nothing was answered so far",
        "8 tokens generated from a prompt of 5",
        "there is no folder 'no/such/folder'",
        "going back to tiny-stories",
        f"saved as {saved}",
        "there is no /stay",
        "the system message is set",
        "nothing was asked so far",
        "Ctrl-C stops an answer",
    ):
        assert line in said
    assert said.count("direct") >= 2
