"""Files to run p2pinfer with docker, as far as a machine without docker can tell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from p2pinfer.cli.app import run
from p2pinfer.config import variable_of

yaml: Any = pytest.importorskip("yaml")

DEPLOY = Path(__file__).parent.parent / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
INSTRUCTIONS = {
    *("FROM", "ARG", "RUN", "COPY", "USER", "ENV", "WORKDIR", "VOLUME", "EXPOSE", "STOPSIGNAL"),
    *("ENTRYPOINT", "CMD"),
}


def instructions() -> list[tuple[str, str]]:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


@pytest.mark.usefixtures("undo_logging")
@pytest.mark.parametrize("name", [name for name, said in SERVICES.items() if "entrypoint" not in said])
def test_every_service_runs_a_command_that_is_understood(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    command = [word.replace("${MODEL:-tiny-stories}", "tiny-stories") for word in SERVICES[name]["command"]]
    assert run([*command, "--print-config", "--json"]) == 0, capsys.readouterr().err
    settings = json.loads(capsys.readouterr().out)
    assert "/swarm/swarm.key" in json.dumps(settings)


def test_what_services_name_is_there() -> None:
    assert set(SERVICES) == {"setup", "first", "second", "third", "door"}
    for said in SERVICES.values():
        assert {each.partition(":")[0] for each in said["volumes"]} <= COMPOSE["volumes"].keys()
        assert set(said.get("depends_on", {})) <= SERVICES.keys()
        assert set(said.get("secrets", ())) <= COMPOSE["secrets"].keys()
    kept = [SERVICES[name]["volumes"][0] for name in ("first", "second", "third", "door")]
    assert len(set(kept)) == 4, "two nodes would be one peer"


def test_the_image_runs_a_node_that_is_understood(
    monkeypatch: pytest.MonkeyPatch, undo_logging: None, capsys: pytest.CaptureFixture[str]
) -> None:
    said = dict(instructions())
    assert {word for word, _ in instructions()} <= INSTRUCTIONS
    assert json.loads(said["ENTRYPOINT"]) == ["p2pinfer"]
    assert run([*json.loads(said["CMD"]), "--print-config"]) == 0
    for each in said["ENV"].split():
        name, _, value = each.partition("=")
        assert name in {variable_of("data_dir"), variable_of("cache_dir")}
        assert value.startswith(said["VOLUME"])
    assert said["USER"] != "root"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="runs sh")
def test_the_setup_makes_a_key_and_an_address_and_makes_them_once(tmp_path: Path) -> None:
    (script,) = SERVICES["setup"]["command"]
    for name in ("swarm", "first", "second", "third", "door"):
        (tmp_path / name).mkdir()
        script = re.sub(rf"(?<![\w/])/{name}\b", str(tmp_path / name), script)
    program = f"{sys.executable} -m p2pinfer"
    script = script.replace("$$", "$").replace("p2pinfer keygen", f"{program} keygen")
    environment = {**os.environ, "P2PINFER_DATA_DIR": str(tmp_path / "home")}
    made: list[tuple[bytes, bytes]] = []
    for _ in range(2):
        subprocess.run(["sh", "-ec", f"chown() {{ :; }}\n{script}"], check=True, env=environment)
        key, peers = tmp_path / "swarm" / "swarm.key", tmp_path / "swarm" / "bootstrap_peers.txt"
        made.append((key.read_bytes(), peers.read_bytes()))
    assert made[0] == made[1]
    assert re.fullmatch(r"/dns4/first/tcp/4001/p2p/12D3KooW\w{44}\n", made[0][1].decode())
    assert (tmp_path / "first" / "state" / "identity.key").stat().st_mode & 0o777 == 0o600
