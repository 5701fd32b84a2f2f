"""`p2pinfer node`: its events, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from p2pinfer.cli.app import run
from p2pinfer.cli.commands import node as node_command
from p2pinfer.errors import LocalError
from p2pinfer.node.transport.identity import new_identity

from ..support import start_node, wait_ready

pytestmark = pytest.mark.slow


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the node prints; it is asked to stop when it says that others can join."""
    lines: list[str] = []

    def write_out(text: str) -> None:
        lines.append(text)
        if '"ready"' in text or "join with" in text:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(node_command, "write_out", write_out)
    return lines


def test_json_is_an_event_a_line_and_ready_says_what_is_served(printed: list[str], tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert (
        run(
            ["node", "--json", "--blocks", "2:4", "--listen", "/ip4/127.0.0.1/tcp/0", "--data-dir", str(home)]
        )
        == 0
    )
    events = [json.loads(line) for line in printed]
    kinds = [event["event"] for event in events if event["event"] not in ("joined", "reached")]
    assert kinds == ["starting", "loading", "ready", "leaving", "stopped"]
    ready = next(event for event in events if event["event"] == "ready")
    assert ready["cache_bytes"] > ready["cache_tokens"]
    assert 0 < ready["weights_bytes"] < 100 << 20
    assert ready["relay_bytes_per_s"] == 1e6
    assert 0 < events[-1]["uptime_s"] < 300
    assert events[-1]["sessions"] == events[-1]["tokens"] == 0
    assert ready["blocks"] == [2, 4]
    assert ready["model"] == "tiny-stories"
    assert len(ready["revision"]) == 32
    assert all(addr.endswith(f"/p2p/{ready['peer_id']}") for addr in ready["addrs"])
    assert any(home.iterdir())


def test_people_get_lines_with_the_time(printed: list[str]) -> None:
    assert run(["node", "--no-blocks", "--listen", "/ip4/127.0.0.1/tcp/0"]) == 0
    assert "introducing peers to each other" in printed[0]
    assert printed[0][2] == ":"
    assert "--bootstrap /ip4/127.0.0.1/tcp/" in printed[0]


def test_quiet_is_quiet(printed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pinfer.node.node.run_node", _end_at_once)
    assert run(["node", "-q"]) == 0
    assert printed == []


async def _end_at_once(*args: object, report: object, **kwargs: object) -> None:
    from p2pinfer.node.events import NodeLeaving

    assert callable(report)
    report(NodeLeaving(0))


@pytest.mark.parametrize(
    ("argv", "exit_code", "complaint"),
    [
        (["--blocks", "4"], 2, "'4' is not a span of blocks"),
        (["--blocks", "6:9"], 2, "tiny-stories has 8 blocks"),
        (["--blocks", "0:4", "--num-blocks", "2"], 2, "give one of them"),
        (["--model", "no/such/folder"], 1, "there is no folder 'no/such/folder'"),
        (["--listen", "here"], 1, "cannot listen: 'here'"),
        (["--bootstrap", "there"], 2, "--bootstrap: 'there'"),
    ],
)
def test_what_cannot_work_is_one_line(
    argv: list[str], exit_code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["node", *argv]) == exit_code
    text, said = capsys.readouterr()
    assert text == ""
    assert said.startswith("p2pinfer: ")
    assert said.count("\n") == 1
    assert complaint in said


def test_a_node_leaves_when_its_standard_input_ends(tmp_path: Path) -> None:
    node = start_node(tmp_path, None)
    assert wait_ready(node)["blocks"] is None
    _, said = node.communicate(timeout=90)
    assert (node.returncode, said) == (0, "")


def test_a_node_can_serve_the_http_api_and_the_page(tmp_path: Path) -> None:
    node = start_node(tmp_path, "0:8", "--serve", "--set", "api.port=0", "--set", "audit.rate=0.0")
    assert node.stdout is not None
    told: dict[str, dict[str, Any]] = {}
    while "serving" not in told:
        line = node.stdout.readline()
        assert line, node.communicate(timeout=90)
        event = json.loads(line)
        told[event["event"]] = event
    (url,) = told["serving"]["urls"]
    asked = {"model": "tiny-stories", "prompt": "Once upon a time", "max_tokens": 5, "temperature": 0}
    with urlopen(f"{url}/v1/completions", json.dumps(asked).encode()) as answer:
        said = json.load(answer)
    assert said["choices"][0]["text"] == ", there was a little"
    assert said["p2pinfer"]["route"][0]["peer_id"] == told["ready"]["peer_id"]
    with urlopen(url) as answer:
        assert b"<title>" in answer.read()
    node.terminate()
    node.communicate(timeout=90)
    assert node.returncode == 0


def test_an_api_that_others_reach_needs_a_key_at_a_node_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "--web", "--set", "api.host=0.0.0.0"]) == 2
    assert "a key is required" in capsys.readouterr().err


def test_ctrl_c_is_a_polite_goodbye(tmp_path: Path) -> None:
    node = start_node(tmp_path, "0:1")
    wait_ready(node)
    node.send_signal(signal.SIGINT)
    events, said = node.communicate(timeout=90)
    assert [json.loads(line)["event"] for line in events.splitlines()][-2:] == ["leaving", "stopped"]
    assert (node.returncode, said) == (130, "")


def test_a_node_says_whom_it_joined_and_what_it_did(tmp_path: Path) -> None:
    homes = [tmp_path / name for name in ("there", "node")]
    for home in homes:
        home.mkdir()
    there = start_node(homes[0], None)
    address = wait_ready(there)["addrs"][0]
    dead = address.replace(port_of(address), "/tcp/1/").rpartition("/")[0] + f"/{new_identity().peer_id}"
    node = start_node(homes[1], "0:8", "--bootstrap", address, "--bootstrap", dead, "--relay-rate", "0")
    try:
        assert node.stdout is not None
        events: dict[str, Any] = {}
        for line in node.stdout:
            event = json.loads(line)
            events[event["event"]] = event
            if {"ready", "joined"} <= events.keys():
                break
        assert (events["joined"]["peers"], events["joined"]["answered"]) == (1, [address])
        ((silent, why),) = events["joined"]["silent"]
        assert silent == dead
        assert "Connection refused" in why
        assert events["ready"]["relay_bytes_per_s"] == 0
        asking = ["generate", "--bootstrap", address, "--max-new-tokens", "3", "Once upon a time"]
        assert run(asking) == 0
    finally:
        for each in (node, there):
            each.terminate()
    lines = [json.loads(line) for line in node.communicate(timeout=90)[0].splitlines()]
    there.communicate(timeout=90)
    assert lines[-1]["event"] == "stopped"
    assert lines[-1]["sessions"] == 1
    assert lines[-1]["tokens"] >= 3
    assert lines[-1]["bytes_sent"] > 1000


def port_of(address: str) -> str:
    """`/tcp/41234/` of an address."""
    return f"/tcp/{address.split('/')[4]}/"


def test_a_node_with_nothing_to_do_checks_others(tmp_path: Path) -> None:
    homes = [tmp_path / name for name in ("other", "node")]
    for home in homes:
        home.mkdir()
    other = start_node(homes[0], "0:8")
    address = wait_ready(other)["addrs"][0]
    at_once = ("--set", "verify.idle_s=0.1", "--set", "verify.pause_s=0", "--set", "verify.share=1")
    node = start_node(homes[1], "0:8", "--verify", "--bootstrap", address, *at_once)
    try:
        wait_ready(node)
        assert node.stdout is not None
        events = (json.loads(line) for line in node.stdout)
        verified = next(each for each in events if each["event"] == "verified")
        assert verified["audits"] >= 1
        assert verified["passed"] == verified["audits"]
    finally:
        for each in (node, other):
            each.send_signal(signal.SIGTERM)
            each.communicate(timeout=90)


def test_a_full_disk_under_the_output_costs_lines_and_no_sessions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed: list[str] = []

    def write_out(text: str) -> None:
        printed.append(text)
        if len(printed) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        raise LocalError("standard output cannot be written: No space left on device")

    monkeypatch.setattr(node_command, "write_out", write_out)
    assert run(["node", "--json", "--no-blocks", "--listen", "/ip4/127.0.0.1/tcp/0"]) == 0
    assert printed
    assert "No space left on device; serving on" in capsys.readouterr().err


def test_a_metrics_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        argv = ["node", "--no-blocks", "--listen", "/ip4/127.0.0.1/tcp/0", "--metrics-port", str(port)]
        assert run(argv) == 1
    assert f"metrics cannot be served on 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--metrics-port", "70000"], "--metrics-port is 70000; ports are 0 to 65535"),
        (["--swarm-key", "nowhere.key"], "the swarm key nowhere.key cannot be read"),
        (["--allow", "nobody"], "nobody is neither a peer id nor a file"),
        (["--deny", "nobody"], "nobody is neither a peer id nor a file"),
        (["--set", "weights_bytes=-1"], "weights_bytes is -1; it must be 0 or more"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["node", "--no-blocks", "--listen", "/ip4/127.0.0.1/tcp/0", *flags]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
