"""A real `p2pinfer serve` over two real nodes, for clients that nobody here wrote."""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ...e2e.support import PATIENCE_S, NodeProcess
from ...forking import fork_server
from ...ports import free_port

KEY = "a-key-of-16-or-more"
TEMPLATE = Path(__file__).parents[2] / "models/text/chat_templates/tools-tools-in-the-system-prompt.jinja"


@dataclass(frozen=True)
class Serving:
    """A server.

    Attributes:
        url: Without a path.
        key: One that it takes.
        metrics: Ports at which its nodes tell of themselves.
    """

    url: str
    key: str
    metrics: tuple[int, ...]
    model: str = "tiny-chat"

    def wait_until_nobody_is_served(self) -> None:
        """Return when no node has a session any more."""
        ends = time.monotonic() + PATIENCE_S
        while any(_sessions(port) for port in self.metrics):
            assert time.monotonic() < ends, "a session is left"
            time.sleep(0.02)


def _sessions(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        found = re.search(r"^p2pinfer_sessions (\S+)", answer.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.fixture(scope="package")
def serving(tiny_stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Serving]:
    """The bundled model with a chat template that takes tools, served to those who have a key."""
    home = tmp_path_factory.mktemp("serving")
    model = home / "tiny-chat"
    shutil.copytree(tiny_stories, model)
    shutil.copyfile(TEMPLATE, model / "chat_template.jinja")
    (home / "keys").write_text(f"{KEY}\n", encoding="utf-8")
    (home / "keys").chmod(0o600)
    common = ["--model", str(model), "--set", f"cache_dir={home / 'cache'}"]
    ports = (free_port(), free_port())
    nodes: list[NodeProcess] = []
    flags: list[str] = []
    try:
        for blocks, port in zip(("0:5", "5:8"), ports, strict=True):
            argv = ["--blocks", blocks, "--metrics-port", str(port), *common, *flags]
            nodes.append(NodeProcess(home / f"node-{blocks[0]}", *argv))
            if not flags:
                flags = ["--bootstrap", nodes[0].ready()[1]]
        nodes[1].ready()
        argv = ["serve", "--json", "--port", "0", "--api-key-file", str(home / "keys"), *common, *flags]
        argv += [
            "--set",
            "audit.rate=0.0",
            "--set",
            "client.dtype=float32",
            "--data-dir",
            str(home / "serve"),
        ]
        with (home / "said").open("w+") as said:
            server = fork_server().start(argv, cwd=home, stderr=said)
            try:
                assert server.stdout is not None
                line = server.stdout.readline()
                assert line, f"the server ended: {(home / 'said').read_text()}"
                yield Serving(json.loads(line)["urls"][0], KEY, ports)
            finally:
                server.terminate()
                server.communicate(PATIENCE_S)
            assert "Traceback" not in (home / "said").read_text(encoding="utf-8")
    finally:
        for node in nodes:
            node.end()
