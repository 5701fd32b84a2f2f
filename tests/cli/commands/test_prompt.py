"""Where a prompt comes from, and what is said when a shell has made something else of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path

import pytest

from p2pinfer.cli.app import run
from p2pinfer.cli.commands.prompt import as_prompt, take_prompt
from p2pinfer.errors import ConfigError, LocalError
from p2pinfer.models.text.chat_template import ChatPrompt, ChatTemplate

SetStdin = Callable[[bytes], None]


@pytest.fixture
def stdin_is(monkeypatch: pytest.MonkeyPatch) -> Generator[Callable[[int], None]]:
    """Makes a file descriptor standard input; before that there is none."""
    monkeypatch.setattr(sys, "stdin", None)
    with ExitStack() as opened:

        def take(fd: int) -> None:
            monkeypatch.setattr(sys, "stdin", opened.enter_context(os.fdopen(fd, encoding="ascii")))

        yield take


@pytest.fixture
def from_file(tmp_path: Path, stdin_is: Callable[[int], None]) -> SetStdin:
    """Redirects standard input from a file with this content."""

    def set_stdin(content: bytes) -> None:
        (tmp_path / "stdin").write_bytes(content)
        stdin_is(os.open(tmp_path / "stdin", os.O_RDONLY))

    return set_stdin


@pytest.fixture
def from_pipe(stdin_is: Callable[[int], None]) -> SetStdin:
    """The same from a pipe."""

    def set_stdin(content: bytes) -> None:
        reading, writing = os.pipe()
        os.write(writing, content)
        os.close(writing)
        stdin_is(reading)

    return set_stdin


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (b"Once upon a time", "Once upon a time"),
        (b"Once upon a time\n", "Once upon a time"),
        (b"Once\r\nupon a time\r\n", "Once\nupon a time"),
        (b"\xef\xbb\xbfOnce\r\n", "Once"),
        ("\ufeffCaf\u00e9 \u2192\r\n".encode("utf-16-le"), "Caf\u00e9 \u2192"),
        ("\ufeffCaf\u00e9".encode("utf-16-be"), "Caf\u00e9"),
        (b"two\n\n", "two\n"),
        (b"-", "-"),
        (b"a\0b\n", "a\0b"),
    ],
)
@pytest.mark.parametrize("given", ["-", None])
def test_standard_input_is_read_for_a_dash_and_when_no_prompt_is_given(
    given: str | None, content: bytes, prompt: str, from_file: SetStdin, from_pipe: SetStdin
) -> None:
    for redirect in (from_file, from_pipe):
        redirect(content)
        assert take_prompt(given) == prompt


def test_nothing_on_standard_input_is_an_empty_prompt_only_if_it_was_named(from_pipe: SetStdin) -> None:
    from_pipe(b"")
    assert take_prompt("-") == ""
    from_pipe(b"\n")
    assert take_prompt(None) is None


def test_a_terminal_or_dev_null_is_no_prompt(stdin_is: Callable[[int], None]) -> None:
    stdin_is(os.open(os.devnull, os.O_RDONLY))
    assert take_prompt(None) is None
    ours, theirs = os.openpty()
    stdin_is(theirs)
    assert take_prompt(None) is None
    os.close(ours)


def test_what_is_piped_beside_a_prompt_is_left_and_that_is_said(
    from_pipe: SetStdin, capsys: pytest.CaptureFixture[str]
) -> None:
    from_pipe(b"more")
    assert take_prompt("Once") == "Once"
    assert "standard input is not read, because PROMPT is given" in capsys.readouterr().err
    assert take_prompt("Once", quiet=True) == "Once"
    from_pipe(b"")
    assert take_prompt("Once") == "Once"
    assert capsys.readouterr().err == ""


def test_a_mark_that_a_shell_read_from_a_file_is_left_out() -> None:
    assert take_prompt("\ufeffOnce") == "Once"


@pytest.mark.parametrize("content", [b"caf\xe9", b"\xff\xfe", b"\xff\xfeabc", b"\x81\x40"])
def test_what_is_no_text_is_refused(content: bytes, from_file: SetStdin) -> None:
    from_file(content)
    with pytest.raises(ConfigError, match="the prompt on standard input is not UTF-8 text"):
        take_prompt("-")


def test_what_has_no_end_is_refused(stdin_is: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pinfer.cli.commands.prompt.MAX_BYTES", 1 << 20)
    stdin_is(os.open("/dev/zero", os.O_RDONLY))
    with pytest.raises(ConfigError, match="is longer than 1 MiB; shorten it"):
        take_prompt("-")


def test_a_standard_input_that_is_closed_or_cannot_be_read_is_said(
    tmp_path: Path, stdin_is: Callable[[int], None]
) -> None:
    with pytest.raises(LocalError, match="standard input is closed"):
        take_prompt("-")
    assert take_prompt(None) is None
    reading = os.open("/proc/self/mem", os.O_RDONLY)  # whose first page is nobody's
    stdin_is(reading)
    with pytest.raises(LocalError, match="standard input cannot be read: "):
        take_prompt("-")


@pytest.mark.parametrize(
    "prompt", ["-5 degrees", "-x...", "-quiet is the night", "- what now?", "--hello there", "-qx", "-vvvx"]
)
def test_a_prompt_that_begins_with_a_dash_is_told_the_way(
    prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", prompt]) == 2
    said = capsys.readouterr().err
    assert "Put -- before a prompt that begins with a dash: p2pinfer generate -- " in said
    assert prompt in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("argv", [["--tempreature", "1", "x"], ["--seed", "1", "--nope", "--", "-5 degrees"]])
def test_an_option_that_does_not_exist_is_no_prompt(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", *argv]) == 2
    assert "begins with a dash" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["generate", "caf\udce9"], "PROMPT is"),
        (["generate", "--stop", "caf\udce9", "x"], "--stop: generation.stop is"),
        (["generate", "--resume", "caf\udce9"], "--resume is"),
        (["generate", "--policy", "caf\udce9", "x"], "--policy: client.policy is"),
        (["generate", "--set", "client.policy=caf\udce9", "x"], "--set: client.policy is"),
        (["generate", "--bootstrap", "caf\udce9", "x"], "--bootstrap: bootstrap is"),
        (["reputation", "show", "caf\udce9"], "PEER is"),
        (["reputation", "ban", "12D3KooW", "--why", "caf\udce9"], "--why is"),
    ],
)
def test_bytes_that_are_no_text_are_told_by_the_name_of_what_they_are(
    argv: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"p2pinfer: {name} not UTF-8 text")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "exit_code", "complaint"),
    [
        (
            ["generate", "--model", "{odd}", "x"],
            1,
            "the path is not UTF-8, so safetensors cannot open it",
        ),
        (["generate", "--swarm-key", "{odd}/no", "x"], 2, "cannot be read: No such file"),
        (["generate", "--allow", "{odd}/no", "x"], 2, "is neither a peer id nor a file"),
        (["node", "--config", "{odd}/no"], 2, "does not exist"),
        (["reputation", "import", "{odd}/no"], 1, "cannot read"),
    ],
)
def test_a_path_may_be_any_bytes(
    argv: list[str], exit_code: int, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is said of it is what is wrong with the file, not with its name."""
    odd = tmp_path / "caf\udce9"
    odd.mkdir()
    assert run([word.replace("{odd}", str(odd)) for word in argv]) == exit_code
    assert complaint in capsys.readouterr().err


def test_things_are_kept_in_a_folder_of_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = str(tmp_path / "caf\udce9")
    peer = "12D3KooWHRDh3yL8gix9dCiwmrLZahcKY8Ae7ovYj3Tb1iAg6gpz"
    assert run(["reputation", "ban", peer, "--data-dir", odd]) == 0
    assert run(["keygen", "--json", f"{odd}/key"]) == 0
    assert '/caf\\udce9/key"' in capsys.readouterr().out
    assert {"key", "ledger.sqlite"} <= {path.name for path in Path(odd).iterdir()}


TEMPLATE = ChatTemplate(
    {"default": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"}, {}
)


@pytest.mark.parametrize(
    ("template", "as_chat", "system", "expected"),
    [
        (None, None, None, "Hi"),
        (None, False, None, "Hi"),
        (TEMPLATE, False, None, "Hi"),
        (TEMPLATE, None, None, ChatPrompt("[user]Hi[assistant]")),
        (TEMPLATE, True, "Be brief.", ChatPrompt("[system]Be brief.[user]Hi[assistant]")),
    ],
)
async def test_a_prompt_is_a_chat_where_the_model_has_a_template(
    template: ChatTemplate | None, as_chat: bool | None, system: str | None, expected: str | ChatPrompt
) -> None:
    assert await as_prompt(template, "Hi", as_chat, system) == expected


@pytest.mark.parametrize(
    ("template", "as_chat", "system", "said"),
    [
        (None, True, None, "the model has no chat template"),
        (None, None, "Be brief.", "the model has no chat template"),
        (TEMPLATE, False, "Be brief.", "--raw sends no chat"),
    ],
)
async def test_a_chat_that_cannot_be_is_refused(
    template: ChatTemplate | None, as_chat: bool | None, system: str | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        await as_prompt(template, "Hi", as_chat, system)
