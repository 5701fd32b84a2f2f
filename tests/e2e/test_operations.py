"""What an operator sees of a private swarm: its numbers, its log, and nothing that is anybody's secret."""

from __future__ import annotations

import base64
import json
import subprocess
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

from p2pinfer.config import environment_without_settings
from p2pinfer.node.transport.identity import load_identity
from p2pinfer.node.transport.swarm_key import load_swarm_key, make_swarm_key

from ..forking import fork_server
from ..ports import free_port
from .support import PATIENCE_S, NodeProcess

pytestmark = pytest.mark.slow

PROMPT = "The giraffe and the umbrella went sailing to Valparaiso"
TEN_STEPS = ("--max-new-tokens", "10", "--speculate", "off")
LOGGED = ("--log-level", "debug", "--log-format", "json")


@dataclass(frozen=True)
class Private:
    """A node of a private swarm that holds the whole bundled model."""

    node: NodeProcess
    home: Path
    key: Path
    address: str
    metrics_port: int

    def generate(self, *flags: str) -> subprocess.CompletedProcess[str]:
        argv = ["generate", "--bootstrap", self.address, *flags, PROMPT]
        environ = environment_without_settings()
        environ |= {f"XDG_{kind}_HOME": str(self.home / kind) for kind in ("DATA", "CONFIG", "CACHE")}
        return fork_server().run(argv, cwd=self.home, env=environ, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Generator[Private]:
    home = tmp_path_factory.mktemp("private")
    key, port = home / "swarm.key", free_port()
    make_swarm_key(key)
    flags = ["--swarm-key", str(key), "--metrics-port", str(port), "--blocks", "0:8", *LOGGED]
    node = NodeProcess(home / "node", *flags, "--set", f"cache_dir={home}")
    try:
        yield Private(node, home, key, node.ready()[1], port)
    finally:
        node.end()


def secrets_of(private: Private, text: str) -> dict[str, str]:
    """What must not be in a log, by what it is."""
    key = load_swarm_key(private.key)
    identity = load_identity(private.home / "node").key_pair.private_key.to_bytes()
    found = {f"the word {word!r}": word for word in (*PROMPT.split(), *text.split()) if len(word) > 7}
    for name, content in (("the swarm key", key), ("the identity", identity[:32])):
        found[f"{name} in hexadecimal"] = content.hex()
        found[f"{name} in base64"] = base64.b64encode(content).decode().rstrip("=")[:40]
        found[f"{name} as Python shows it"] = repr(content)[2:-1]
    return found


def test_a_member_is_served_and_no_log_tells_what_was_said(private: Private) -> None:
    result = private.generate("--swarm-key", str(private.key), "--max-new-tokens", "40", *LOGGED)
    assert result.returncode == 0, result.stderr
    said = private.node.said()
    for log in (said, result.stderr):
        lines = [json.loads(line) for line in log.splitlines()]
        assert any(line["level"] == "debug" for line in lines)
        assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
        for what, secret in secrets_of(private, result.stdout).items():
            assert secret not in log, f"a log holds {what}"
    assert "umbrella" in secrets_of(private, result.stdout).values()


def test_metrics_tell_what_was_served(private: Private) -> None:
    assert private.generate(*TEN_STEPS, "--swarm-key", str(private.key)).returncode == 0
    with urllib.request.urlopen(f"http://127.0.0.1:{private.metrics_port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["p2pinfer_sessions_opened_total"]) >= 1
    assert float(values["p2pinfer_steps_total"]) >= 10
    assert float(values["p2pinfer_tokens_total"]) > float(values["p2pinfer_steps_total"])
    assert 0 < float(values["p2pinfer_batches_total"]) <= float(values["p2pinfer_steps_total"])
    assert float(values["p2pinfer_cache_free_tokens"]) <= float(values["p2pinfer_cache_tokens"])
    assert float(values['p2pinfer_bytes_total{connection="direct",direction="received"}']) > 1000
    assert "giraffe" not in text


def test_who_lacks_the_key_hears_of_it_and_so_does_the_operator(private: Private) -> None:
    result = private.generate("--max-new-tokens", "10")
    assert result.returncode == 1
    assert "is of a private swarm whose key we lack" in result.stderr
    assert "it lacks the key of this private swarm" in private.node.said()
