"""Making the key of a private swarm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2pinfer.cli.app import run
from p2pinfer.node.transport.swarm_key import load_swarm_key


def test_a_key_is_made_and_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "swarm.key"
    assert run(["keygen", str(path)]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert f"--swarm-key {path}" in said.err
    assert load_swarm_key(path).hex() not in said.err


def test_a_key_in_use_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "swarm.key"
    assert run(["keygen", "-q", str(path)]) == 0
    key = path.read_bytes()
    assert run(["keygen", str(path)]) == 2
    assert "is not overwritten" in capsys.readouterr().err
    assert path.read_bytes() == key


def test_programs_are_told_where_the_key_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "swarm.key"
    assert run(["keygen", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"swarm_key": str(path)}
