"""`p2pinfer serve` as a process: several models, and what it refuses before it loads anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

from p2pinfer.cli.app import run

from ...forking import fork_server


def ask(url: str, **wish: Any) -> Any:
    with urlopen(Request(url, json.dumps(wish).encode() if wish else None)) as answer:
        return json.load(answer)


def test_several_models_are_served_and_each_is_asked_by_its_name(
    swarm_address: str, tiny_stories: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_stories, tmp_path / "teller")  # the same weights: the swarm serves them
    argv = ["serve", "--json", "--port", "0", "--bootstrap", swarm_address, "--set", "audit.rate=0.0"]
    argv += ["--model", "tiny-stories", "--model", str(folder), "--model", "tiny-stories"]
    server = fork_server().start([*argv, "--data-dir", str(tmp_path)], cwd=tmp_path)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line, server.communicate(timeout=90)
        told = json.loads(line)
        assert (told["model"], told["models"]) == ("tiny-stories", ["tiny-stories", "teller"])
        (url,) = told["urls"]
        assert [each["id"] for each in ask(f"{url}/v1/models")["data"]] == told["models"]
        for name in told["models"]:
            wish = {"model": name, "prompt": "Once upon a time", "max_tokens": 5, "temperature": 0}
            said = ask(f"{url}/v1/completions", **wish)
            assert (said["model"], said["choices"][0]["text"]) == (name, ", there was a little")
            assert len(said["p2pinfer"]["route"]) == 2
            state = ask(f"{url}/p2pinfer/swarm?model={quote(name)}")
            assert (state["swarm"]["model"], state["models"]) == (name, told["models"])
            assert len(state["swarm"]["peers"]) == 2
    finally:
        server.terminate()
        _, complaints = server.communicate(timeout=90)
    assert "Traceback" not in complaints


def test_one_identity_is_not_given_to_the_clients_of_two_models(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["serve", "--model", "a", "--model", "b", "--identity", str(tmp_path / "me.key")]
    assert run(argv) == 2
    assert "is one client's, and 2 models need as many clients" in capsys.readouterr().err


def test_an_address_that_others_reach_needs_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--host", "0.0.0.0"]) == 2
    assert "a key is required" in capsys.readouterr().err
