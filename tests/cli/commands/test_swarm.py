"""`p2pinfer swarm` against two real node processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import RenderableType
from rich.live import Live

from p2pinfer.cli.app import run
from p2pinfer.cli.output import swarm_table

from ...forking import fork_server
from ..support import start_node, wait_ready

pytestmark = pytest.mark.slow


def test_people_see_a_table(swarm_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["swarm", "--bootstrap", swarm_address]) == 0
    shown, said = capsys.readouterr()
    assert shown.startswith("tiny-stories  ████████  all 8 blocks are served\n")
    assert "0:5" in shown
    assert "3:8" in shown
    assert "direct" in shown
    assert said == ""


def test_json_is_one_object(swarm_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["swarm", "--json", "--bootstrap", swarm_address]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told["missing"] == []
    assert sorted(peer["blocks"] for peer in told["peers"]) == [[0, 5], [3, 8]]
    reached = next(peer for peer in told["peers"] if swarm_address.endswith(peer["peer_id"]))
    assert reached["connection"] == "direct"
    assert 0 < reached["rtt_ms"] < 1000


def test_without_a_swarm_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["swarm"]) == 1
    assert "no peer of a swarm answered; name one" in capsys.readouterr().err


def test_a_terminal_is_watched_in_place(
    swarm_address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class TwoLooks(Live):
        looks = 0

        def update(self, renderable: RenderableType, *, refresh: bool = False) -> None:
            super().update(renderable, refresh=refresh)
            self.looks += 1
            if self.looks == 2:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(swarm_table, "Live", TwoLooks)
    monkeypatch.setattr(swarm_table, "REFRESH_S", 0.01)
    assert run(["swarm", "--watch", "--bootstrap", swarm_address]) == 130
    assert capsys.readouterr().out.count("all 8 blocks are served") >= 1


def test_watching_goes_on_until_ctrl_c(swarm_address: str, tmp_path: Path) -> None:
    argv = ["swarm", "--json", "--watch", "--bootstrap", swarm_address]
    process = fork_server().start(argv, cwd=tmp_path)
    assert process.stdout is not None
    for _ in range(2):
        assert json.loads(process.stdout.readline())["num_blocks"] == 8
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=90)
    assert (process.returncode, said) == (130, "")


def test_ctrl_c_does_not_wait_for_a_silent_hub() -> None:
    command = [sys.executable, "-m", "p2pinfer", "swarm", "--model", "somebody/something"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        patient = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_ETAG_TIMEOUT": "600"}
        process = subprocess.Popen(command, env=patient, stderr=subprocess.PIPE, text=True)
        asking, _ = silent.accept()
        with asking:
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=90)
    assert (process.returncode, said) == (130, "")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_the_ghost_of_a_killed_or_frozen_node_is_not_called_served(
    tmp_path: Path, signum: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    homes = [tmp_path / name for name in ("there", "ghost")]
    for home in homes:
        home.mkdir()
    there = start_node(homes[0], "0:4")
    address = wait_ready(there)["addrs"][0]
    ghost = start_node(homes[1], "4:8", "--bootstrap", address)
    try:
        ghost_id = wait_ready(ghost)["peer_id"]
        assert run(["swarm", "--bootstrap", address]) == 0
        assert "all 8 blocks are served" in capsys.readouterr().out
        ghost.send_signal(signum)
        if signum == signal.SIGKILL:
            ghost.wait(timeout=90)
        assert run(["swarm", "--bootstrap", address]) == 0
        shown = capsys.readouterr().out
        assert "the peers that announced 4:8 of its 8 blocks do not answer" in " ".join(shown.split())
        assert "no answer" in shown
        assert run(["swarm", "--json", "--bootstrap", address]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["missing"] == told["unknown"] == [[4, 8]]
        assert {peer["state"] for peer in told["peers"] if peer["peer_id"] == ghost_id} == {"unknown"}
        assert {peer["state"] for peer in told["peers"] if peer["peer_id"] != ghost_id} == {"answers"}
    finally:
        for node in (ghost, there):
            node.kill()
            node.communicate(timeout=90)
