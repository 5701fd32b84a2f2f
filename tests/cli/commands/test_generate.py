"""`p2pinfer generate` against two real node processes."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import p2pinfer
from p2pinfer.cli.app import run
from p2pinfer.errors import PeerVanished
from p2pinfer.generation.saved_state import decode_state, find_token, keep_token
from p2pinfer.session.session import Session

from ...forking import fork_server
from ..support import spoken

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time"
NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWHRDh3yL8gix9dCiwmrLZahcKY8Ae7ovYj3Tb1iAg6gpz"
KEYS = [
    "text",
    "token_ids",
    "prompt_tokens",
    "finish_reason",
    "route",
    "timings",
    "failovers",
    "seed",
    "audits",
    "resume_token",
    "speculation",
    "packed_tokens",
]

POLICY = """
from p2pinfer import RoutingPolicy, cheapest_routes

class Own(RoutingPolicy):
    def choose_routes(self, candidates, request, view):
        print("asked")
        return cheapest_routes(candidates, request, view)
"""


FICKLE = """
from p2pinfer import NoRoute, RoutingPolicy, cheapest_routes

class Fickle(RoutingPolicy):
    sessions = 0

    def choose_routes(self, candidates, request, view):
        self.sessions += 1
        if self.sessions > 1:
            raise NoRoute("no route: nobody serves blocks 3:8", [(3, 8)])
        return cheapest_routes(candidates, request, view)
"""


@pytest.fixture
def fickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A way to generate that ends after three tokens, unless fickle.py is gone; it keeps things in `home`.

    A token a trip: how many several would be depends on what the line was measured to take.
    """
    whole, script = Session.decode, tmp_path / "fickle.py"

    async def decode(self: Session, hidden: Tensor, position: int, *more: Any) -> Tensor:
        if position >= 7 and script.exists():
            raise PeerVanished("gone")
        output: Tensor = await whole(self, hidden, position, *more)
        return output

    monkeypatch.setattr(Session, "decode", decode)
    monkeypatch.chdir(tmp_path)
    script.write_text(FICKLE)
    return ("--data-dir", str(tmp_path / "home"), "--policy", "fickle:Fickle", "--speculate", "off")


def generate(address: str, *more: str) -> int:
    return run(["generate", "--bootstrap", address, "--max-new-tokens", "12", *more])


def test_text_goes_to_standard_output_and_nothing_else_does(
    swarm_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(swarm_address, PROMPT) == 0
    text, said = capsys.readouterr()
    assert text.startswith(", there was a little girl")
    assert text.endswith("\n")
    assert said.startswith("stopped after 12 tokens (--max-new-tokens); to continue: p2pinfer generate ")
    assert said.count("\n") == 1
    assert generate(swarm_address, "--echo", "--stats", PROMPT) == 0
    echoed, bill = capsys.readouterr()
    assert echoed == PROMPT + text
    assert "12 tokens generated from a prompt of 5" in bill
    assert bill.count("direct") == 2


def test_json_is_one_object_with_everything(swarm_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(swarm_address, "--json", PROMPT) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert list(told) == KEYS
    assert told["text"].startswith(", there was a little girl")
    assert len(told["token_ids"]) == 12
    assert told["prompt_tokens"] == 5
    assert told["finish_reason"] == "length"
    assert [hop["blocks"] for hop in told["route"]] in ([[0, 5], [5, 8]], [[0, 3], [3, 8]], [[0, 4], [4, 8]])
    assert {hop["connection"] for hop in told["route"]} == {"direct"}
    assert set(told["timings"]) == {
        "first_token_s",
        "tokens_per_s",
        "per_hop_ms",
        "predicted_tokens_per_s",
    }
    assert len(told["timings"]["per_hop_ms"]) == 2
    assert told["failovers"] == 0
    assert decode_state(told["resume_token"]).token_ids == tuple(told["token_ids"])


def test_a_prompt_from_standard_input_loses_its_line_end(
    swarm_address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode() + b"\n")))
    assert generate(swarm_address, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 5


def test_an_empty_prompt_begins_a_text_where_the_model_can(
    swarm_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """tests/e2e/test_wrong_input.py has a model that cannot."""
    assert generate(swarm_address, "--echo", "") == 0
    assert capsys.readouterr().out.startswith("Once upon a time, there was a little girl")


def test_a_prompt_that_is_no_text_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert run(["generate", "-"]) == 2
    assert "the prompt on standard input is not UTF-8 text" in capsys.readouterr().err


def test_the_text_ends_before_a_stop(swarm_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(swarm_address, "--json", "--stop", "zebra", "--stop", " girl", PROMPT) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["text"] == ", there was a little"
    assert told["finish_reason"] == "stop"


def test_a_seed_draws_the_same_twice(swarm_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = ("--temperature", "1.2", "--seed", "7", "--top-p", "0.9", "--top-k", "50")
    assert generate(swarm_address, *drawn, PROMPT) == 0
    first = capsys.readouterr().out
    assert generate(swarm_address, *drawn, PROMPT) == 0
    assert capsys.readouterr().out == first


def test_a_policy_of_ones_own_is_found_in_the_working_directory(
    swarm_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_policy.py").write_text(POLICY)
    assert generate(swarm_address, "--policy", "own_policy:Own", PROMPT) == 0
    assert "asked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "exit_code", "complaint"),
    [
        (["--bootstrap", "nowhere", "x"], 2, "--bootstrap: 'nowhere' is not of the form"),
        (["--bootstrap", NOBODY, "x"], 1, "no peer of a swarm answered"),
        (["--policy", "slowest", "x"], 2, "'slowest' is no routing policy; built in are risk-adjusted"),
        (["--top-p", "7", "x"], 2, "top_p is 7.0"),
        (["--model", "no/such/folder", "x"], 1, "there is no folder 'no/such/folder'"),
        (["word " * 2000], 1, "tokens long, but the context of tiny-stories is 1024 tokens"),
        ([], 2, "give either PROMPT or --resume TOKEN"),
        (["--resume", "0badcafe", "x"], 2, "give either PROMPT or --resume TOKEN"),
        (["--resume", "0badcafe", "--seed", "3"], 2, "--seed cannot be used with --resume"),
        (["--resume", "0badcafe"], 2, "there is no saved generation '0badcafe' in"),
        (["--resume", "p2pr1.AAAA"], 2, "the resume token is cut short or damaged"),
    ],
)
def test_what_cannot_work_is_said_before_any_node_is_started(
    argv: list[str],
    exit_code: int,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("p2pinfer.embedded.BOOTSTRAP_TIMEOUT_S", 0.5)
    assert run(["generate", *argv]) == exit_code
    text, said = capsys.readouterr()
    assert text == ""
    assert said.startswith("p2pinfer: ")
    assert said.count("\n") == 1
    assert complaint in said


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8", "utf-16"])
def test_no_encoding_ends_a_text_and_json_is_the_same_in_all(
    encoding: str, swarm_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "Once upon a time \u2192 \u00e9 \U0001f600"
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert generate(swarm_address, "--echo", prompt) == 0
    text = written.getvalue().decode(encoding)
    assert text.startswith(prompt.encode(encoding, "backslashreplace").decode(encoding))
    written.seek(0)
    written.truncate()
    assert generate(swarm_address, "--json", prompt) == 0
    told = written.getvalue().decode("utf-16-le" if encoding == "utf-16" else "ascii")
    assert told.isascii()
    assert text.endswith(json.loads(told)["text"] + "\n")


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16"])
def test_a_piped_prompt_is_the_same_with_and_without_a_mark(
    mark: str, swarm_address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts: list[str] = []
    for content in (b"Once upon\na time", "Once upon\r\na time\r\n".encode(mark)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert generate(swarm_address, "--json", "-") == 0
        told = json.loads(capsys.readouterr().out)
        texts.append(f"{told['prompt_tokens']} {told['text']}")
    assert texts[0] == texts[1]


def test_a_reader_that_leaves_ends_it_quietly(swarm_address: str, tmp_path: Path) -> None:
    process = fork_server().start(["generate", "--bootstrap", swarm_address, PROMPT], cwd=tmp_path)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdin, process.stderr, process.stdout:
        process.stdout.read(1)
        process.stdout.close()
        assert spoken(process.stderr.read()) == ""
    assert process.wait(timeout=90) == 141


def test_ctrl_c_takes_the_embedded_swarm_with_it(tmp_path: Path) -> None:
    """Ctrl-C while nodes start: no traceback, no node and no folder left behind."""
    process = subprocess.Popen(
        [sys.executable, "-m", "p2pinfer", "generate", PROMPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stderr is not None
    assert any("starting 3 nodes on this computer" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    text, said = process.communicate(timeout=90)
    assert process.returncode == 130
    assert (text, spoken(said)) == ("", "")
    assert list(tmp_path.glob("p2pinfer-*")) == []


def cut_off(address: str, home: Path) -> str:
    """The token of a text that was left after five tokens of twelve."""
    with p2pinfer.connect(bootstrap=[address], data_dir=home) as connected:
        generation = connected.generate(PROMPT, max_new_tokens=12)
        for _ in range(5):
            next(generation)
        generation.close()
        token = generation.resume_token
    assert token is not None
    return token


def test_a_text_that_was_cut_off_goes_on(
    swarm_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(swarm_address, "--json", PROMPT) == 0
    whole = json.loads(capsys.readouterr().out)
    token = cut_off(swarm_address, tmp_path)
    name = keep_token(token, tmp_path)
    again = ["generate", "--bootstrap", swarm_address, "--data-dir", str(tmp_path), "--resume"]
    assert run([*again, token, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["text"], told["token_ids"]) == (whole["text"], whole["token_ids"])
    assert find_token(name, tmp_path) == token
    assert run([*again, name, "--echo"]) == 0
    text, said = capsys.readouterr()
    assert text == f"{PROMPT}{whole['text']}\n"
    assert said.startswith("stopped after 12 tokens (--max-new-tokens)")
    assert run([*again, name]) == 2
    assert "there is no saved generation" in capsys.readouterr().err


def test_a_text_that_came_to_its_last_token_goes_on_with_more(
    swarm_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed together is what a run with as many tokens prints; nothing is said where it is over."""
    asked = ["generate", "--bootstrap", swarm_address, "--data-dir", str(tmp_path)]
    assert run([*asked, "--max-new-tokens", "20", PROMPT]) == 0
    whole = capsys.readouterr().out
    assert run([*asked, "--max-new-tokens", "8", PROMPT]) == 0
    text, said = capsys.readouterr()
    assert run([*shlex.split(said.rpartition(": p2pinfer ")[2]), "--max-new-tokens", "12"]) == 0
    more, said = capsys.readouterr()
    assert text.removesuffix("\n") + more == whole
    assert said.startswith("stopped after 20 tokens")
    assert len(list((tmp_path / "resume").iterdir())) == 2  # of the run with 20, and of this one
    assert run([*asked, "-q", "--max-new-tokens", "8", PROMPT]) == 0
    assert run([*asked, "--max-new-tokens", "8", "--stop", " there", PROMPT]) == 0
    assert capsys.readouterr().err == ""


def test_where_the_context_is_full_nothing_goes_on(
    swarm_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "word " * 1014
    assert generate(swarm_address, "--json", prompt) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["prompt_tokens"] + len(told["token_ids"]) == 1024
    assert (told["finish_reason"], told["resume_token"]) == ("length", None)
    assert generate(swarm_address, prompt) == 0
    assert capsys.readouterr().err == "stopped: the model's context is full, 1,024 tokens with the prompt\n"


def test_a_text_that_cannot_go_on_says_what_is_missing_and_how_to_go_on(
    swarm_address: str,
    fickle: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = [*fickle, "--wait", "0.3", PROMPT]
    assert generate(swarm_address, *asked) == 1
    text, said = capsys.readouterr()
    waiting, cut, failure = said.splitlines()
    assert waiting == "waiting for up to 0 s: no route: nobody serves blocks 3:8; the last one failed: gone"
    assert failure.startswith("p2pinfer: no route: nobody serves blocks 3:8")
    before, command = cut.split(" p2pinfer ")
    assert before == "interrupted; to continue:"
    assert generate(swarm_address, *asked, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["missing"]) == ("Unfinished", [[3, 8]])
    assert told["text"] == text.removesuffix("\n") == ", there was"
    assert told["resume_token"].startswith("p2pr2.")
    (tmp_path / "fickle.py").unlink()
    assert run(shlex.split(command)) == 0
    assert capsys.readouterr().out.startswith(" a little girl")


def test_a_token_that_cannot_be_kept_is_printed(
    swarm_address: str, fickle: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "resume").write_text("a file in the way")
    assert generate(swarm_address, *fickle, "--wait", "0", PROMPT) == 1
    (kept, _) = capsys.readouterr().err.splitlines()
    assert kept.startswith("cannot save a resume token in")
    assert decode_state(kept.rpartition(" ")[2]).max_new_tokens == 12
