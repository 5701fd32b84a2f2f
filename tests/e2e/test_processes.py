"""The commands as a user runs them: what they print, and what is left when they are interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from ..cli.support import spoken
from ..forking import Command, fork_server
from .support import PATIENCE_S, Swarm

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time"


def unconfigured(home: Path) -> dict[str, str]:
    """An environment with nothing configured, and temporary files in a folder of its own."""
    (home / "tmp").mkdir(exist_ok=True)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("P2PINFER_")}
    environ |= {f"XDG_{kind}_HOME": str(home / kind.lower()) for kind in ("DATA", "CONFIG", "CACHE")}
    return {**environ, "TMPDIR": str(home / "tmp")}


@contextmanager
def command(home: Path, *argv: str) -> Generator[Command]:
    """`p2pinfer` with nothing configured."""
    process = fork_server().start(argv, cwd=home, env=unconfigured(home))
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


SHAPE: dict[str, Any] = {
    "text": str,
    "token_ids": [int],
    "prompt_tokens": int,
    "finish_reason": str,
    "route": [{"peer_id": str, "blocks": [int], "connection": str, "integrity": float, "reliability": float}],
    "timings": {
        "first_token_s": float,
        "tokens_per_s": float,
        "per_hop_ms": [float],
        "predicted_tokens_per_s": (float, type(None)),  # null where a line was never measured
    },
    "failovers": int,
    "seed": type(None),  # it is greedy
    "audits": dict.fromkeys(("done", "passed", "failed", "suspect", "inconclusive"), int),
    "resume_token": str,
    "speculation": {
        "tokens_per_trip": float,
        "drafted": int,
        "accepted": int,
        "by_depth": list,
        "in_flight": float,
        "predicted_tokens_per_s": (float, type(None)),  # null where a line was never measured
    },
    "packed_tokens": int,
}


def assert_shape(told: Any, shape: Any) -> None:
    """Hold a JSON value to its shape: every key, in order, every type, no empty list."""
    if isinstance(shape, dict):
        fields = cast("dict[str, Any]", shape)
        assert list(told) == list(fields)
        for key, inner in fields.items():
            assert_shape(told[key], inner)
    elif isinstance(shape, list):
        parts = cast("list[object]", shape)
        assert told
        for each in told:
            assert_shape(each, parts[0])
    else:
        assert type(told) in (shape if isinstance(shape, tuple) else (shape,))


def test_json_has_the_shape_that_scripts_rely_on(swarm: Swarm, tmp_path: Path) -> None:
    argv = ("generate", "--json", "--bootstrap", swarm.address, "--max-new-tokens", "8", PROMPT)
    ended = subprocess.run(
        [sys.executable, "-m", "p2pinfer", *argv],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=unconfigured(tmp_path),
        timeout=PATIENCE_S,
    )
    assert (ended.returncode, spoken(ended.stderr)) == (0, "")
    told = json.loads(ended.stdout)
    assert_shape(told, SHAPE)
    assert told["text"] == ", there was a little girl named Lily"
    assert [hop["blocks"][0] for hop in told["route"]] + [8] == [0] + [
        hop["blocks"][1] for hop in told["route"]
    ]
    assert {hop["peer_id"] for hop in told["route"]} <= set(swarm.peers)
    assert len(told["token_ids"]) == 8


@contextmanager
def in_the_middle(home: Path) -> Generator[tuple[Command, list[psutil.Process]]]:
    """A generation on a swarm of its own, once it has begun to print; and the swarm's processes."""
    with command(home, "generate", "--max-new-tokens", "900", PROMPT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "no swarm in reach: starting 3 nodes on this computer\n" in process.stderr
        assert process.stdout.read(1) == ","
        nodes = psutil.Process(process.pid).children()
        assert len(nodes) == 3
        assert len(list((home / "tmp").glob("p2pinfer-*"))) == 1
        yield process, nodes


def test_ctrl_c_in_the_middle_of_a_text_leaves_nothing_behind(tmp_path: Path) -> None:
    with in_the_middle(tmp_path) as (process, nodes):
        process.send_signal(signal.SIGINT)
        text, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signal.SIGINT
    assert text.endswith("\n")
    (name,) = re.findall(r"^interrupted; to continue: p2pinfer generate --resume (\w+)\n$", spoken(said))
    assert [path.name for path in (tmp_path / "data" / "p2pinfer" / "resume").iterdir()] == [name]
    assert not [node for node in nodes if node.is_running()]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_nodes_of_a_client_that_was_killed_end_by_themselves(tmp_path: Path) -> None:
    with in_the_middle(tmp_path) as (process, nodes):
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(nodes, timeout=90)
        assert alive == []


def test_a_text_cut_off_by_ctrl_c_goes_on_in_another_process(swarm: Swarm, tmp_path: Path) -> None:
    """Both parts together are what an undisturbed run prints."""
    common = ("--bootstrap", swarm.address)
    drawn = ("--temperature", "1", "--seed", "11", "--max-new-tokens", "300", PROMPT)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    with command(tmp_path / "whole", "generate", *common, *drawn) as process:
        whole, said_of_whole = process.communicate(timeout=PATIENCE_S)
    with command(tmp_path / "cut", "generate", *common, *drawn) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        before = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        # Not by `communicate`, which would not see what has been read ahead.
        before += process.stdout.read().removesuffix("\n")
        said = process.stderr.read()
    assert process.returncode == 128 + signal.SIGINT
    (name,) = re.findall(r"--resume (\w+)", said)
    with command(tmp_path / "cut", "generate", *common, "--resume", name) as process:
        after, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert before + after == whole
    limit = "stopped after 300 tokens (--max-new-tokens)"  # unless the text ends by itself before
    assert (limit in said) == (limit in said_of_whole)
    assert len(before) < len(whole) - 1
