"""`p2pinfer generate` against two real node processes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from p2pinfer.cli.app import run

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time"
NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWHRDh3yL8gix9dCiwmrLZahcKY8Ae7ovYj3Tb1iAg6gpz"
KEYS = ["text", "token_ids", "prompt_tokens", "finish_reason", "route", "timings", "failovers"]

POLICY = """
from p2pinfer import RoutingPolicy, cheapest_routes

class Own(RoutingPolicy):
    def choose_routes(self, candidates, request, view):
        print("asked")
        return cheapest_routes(candidates, request, view)
"""


def generate(address: str, *more: str) -> int:
    return run(["generate", "--bootstrap", address, "--max-new-tokens", "12", *more])


def test_text_goes_to_standard_output_and_nothing_else_does(
    swarm_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(swarm_address, PROMPT) == 0
    text, said = capsys.readouterr()
    assert text.startswith(", there was a little girl")
    assert text.endswith("\n")
    assert said == ""
    assert generate(swarm_address, "--echo", "--stats", PROMPT) == 0
    echoed, bill = capsys.readouterr()
    assert echoed == PROMPT + text
    assert "12 tokens after a prompt of 5" in bill
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
    assert set(told["timings"]) == {"first_token_s", "tokens_per_s", "per_hop_ms"}
    assert len(told["timings"]["per_hop_ms"]) == 2
    assert told["failovers"] == 0


def test_a_prompt_from_standard_input_loses_its_line_end(
    swarm_address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode() + b"\n")))
    assert generate(swarm_address, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 5


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
        (["word " * 2000], 1, "tokens long and tiny-stories takes 1024"),
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


def test_a_reader_that_leaves_ends_it_quietly(swarm_address: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "p2pinfer", "generate", "--bootstrap", swarm_address, PROMPT]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stderr, process.stdout:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.wait(timeout=20) == 141


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
    assert "starting 3 nodes on this computer" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    text, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert (text, said) == ("", "")
    assert list(tmp_path.glob("p2pinfer-*")) == []
