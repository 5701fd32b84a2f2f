"""A terminal that is closed, or an ssh that is lost, is a goodbye: nothing stays reserved, no text lost."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from p2pinfer.generation.saved_state import PREFIX, find_token

from ..forking import Command, fork_server
from .support import start_node, wait_ready

pytestmark = pytest.mark.slow


def wait_for(node: Command, kind: str) -> dict[str, object]:
    assert node.stdout is not None
    return next(event for event in map(json.loads, node.stdout) if event["event"] == kind)


def test_a_node_whose_terminal_is_closed_says_goodbye(tmp_path: Path) -> None:
    node = start_node(tmp_path, "0:1")
    wait_ready(node)
    node.send_signal(signal.SIGHUP)
    events, said = node.communicate(timeout=90)
    assert json.loads(events.splitlines()[0])["event"] == "leaving"
    assert (node.returncode, said) == (0, "")


def test_a_text_whose_terminal_is_closed_is_kept_and_its_session_freed(tmp_path: Path) -> None:
    homes = [tmp_path / name for name in ("node", "client")]
    for home in homes:
        home.mkdir()
    node = start_node(homes[0], "0:8")
    address = wait_ready(node)["addrs"][0]
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "p2pinfer", "generate", "--bootstrap", address, "--temperature", "1.5"]
    command += ["--data-dir", str(homes[1]), "--max-new-tokens", "900", "Once upon a time"]
    # The terminal is this process's controlling one, so that the system itself sends the signal.
    attached = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    attached += "os.execv(sys.argv[1], sys.argv[1:])"
    client = subprocess.Popen(
        [sys.executable, "-c", attached, *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        cwd=homes[1],
    )
    os.close(theirs)
    try:
        wait_for(node, "session_opened")
        while b"..." in os.read(ours, 4096):  # what it waits for, before there is any text
            pass
        os.close(ours)
        assert client.wait(timeout=90) in (1, 128 + signal.SIGHUP)  # or the terminal failed us first
        assert wait_for(node, "session_closed")["sessions"] == 0
        (kept,) = (homes[1] / "resume").iterdir()
        assert find_token(kept.name, homes[1]).startswith(PREFIX)
    finally:
        client.kill()
        client.wait()
        node.terminate()
        node.communicate(timeout=90)


def test_a_second_node_in_the_same_directory_is_refused_and_one_in_the_place_of_a_killed_one_is_not(
    tmp_path: Path,
) -> None:
    first = start_node(tmp_path, "0:1")
    peer_id = wait_ready(first)["peer_id"]
    second = start_node(tmp_path, "0:1")
    events, said = second.communicate(timeout=90)
    assert (second.returncode, "ready" in events) == (1, False)
    assert f"another node uses {tmp_path}: process {first.pid} since " in said
    looking = ["reputation", "--json", "--data-dir", str(tmp_path)]
    assert fork_server().run(looking, cwd=tmp_path, timeout=90).returncode == 0
    first.kill()
    first.communicate()
    third = start_node(tmp_path, "0:1")
    assert wait_ready(third)["peer_id"] == peer_id
    third.terminate()
    third.communicate(timeout=90)
