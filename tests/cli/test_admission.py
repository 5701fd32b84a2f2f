"""Whom a node serves, by names that clients keep if they want to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2pinfer.cli.app import run
from p2pinfer.node.transport.identity import is_peer_id, load_identity_file

from .support import start_node, wait_ready

pytestmark = pytest.mark.slow


def test_a_client_on_the_list_is_served_and_others_hear_how_to_get_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, home = tmp_path / "client.key", tmp_path / "node"
    home.mkdir()
    assert run(["keygen", "--identity", str(key)]) == 0
    ours = capsys.readouterr().out.strip()
    assert is_peer_id(ours)
    (tmp_path / "friends").write_text(f"{ours} clients\n")
    node = start_node(home, "0:8", "--allow", str(tmp_path / "friends"))
    try:
        address = wait_ready(node)["addrs"][0]
        asking = ["generate", "--bootstrap", address, "--max-new-tokens", "3", "Once upon a time"]
        assert run([*asking, "--identity", str(key)]) == 0
        assert capsys.readouterr().out.strip()
        assert run([*asking, "--set", "client.find_timeout_s=0.2"]) == 1
        said = capsys.readouterr().err
        assert "this node does not serve client 12D3" in said
        assert "it is not on the allow list; ask its operator to add that id" in said
        assert run(["swarm", "--json", "--bootstrap", address]) == 0  # anybody may look
        assert json.loads(capsys.readouterr().out)["missing"] == []
    finally:
        node.terminate()
        _, log = node.communicate(timeout=90)
    assert "which is not admitted for clients: it is not on the allow list" in log


def test_keygen_names_a_client_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "client.key"
    assert run(["keygen", "--identity", str(key)]) == 0
    first, said = capsys.readouterr()
    assert f"--allow clients:{first.strip()}" in said
    assert run(["keygen", "--identity", "--json", str(key)]) == 0
    assert json.loads(capsys.readouterr().out) == {"identity": str(key), "peer_id": first.strip()}
    assert load_identity_file(key).peer_id == first.strip()
    key.write_text("nonsense")
    assert run(["keygen", "--identity", str(key)]) == 1
    assert "holds no Ed25519 key" in capsys.readouterr().err
