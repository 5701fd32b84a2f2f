"""Runs what deploy/compose.yml runs, without docker: `make compose`.

    python scripts/try_compose.py

Each service is a process whose volumes are folders of a temporary one. Names of services become 127.0.0.1,
and ports such as are free, since the processes have one network together. Fails unless a text comes through
the HTTP API, by the key in the file of secrets.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

COMPOSE = Path(__file__).parent.parent / "deploy" / "compose.yml"
PROGRAM = [sys.executable, "-m", "p2pinfer"]
READY_S = 120.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        port: int = tried.getsockname()[1]
        return port


class Services:
    """The services of the file, in a folder."""

    def __init__(self, root: Path) -> None:
        said = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
        self.said: dict[str, dict[str, Any]] = said["services"]
        self.ports = {name: free_port() for name in self.said}
        self.key = secrets.token_hex(24)
        self._root = root
        for volume in said["volumes"]:
            (root / volume).mkdir()
        (root / "keys").write_text(self.key)
        (root / "keys").chmod(0o600)

    def set_up(self) -> None:
        """Run the service that the others wait for."""
        (script,) = self.said["setup"]["command"]
        for volume in self._volumes("setup"):
            script = re.sub(rf"(?<![\w/.]){volume}\b", str(self._root / volume.strip("/")), script)
        script = script.replace("$$", "$").replace("p2pinfer keygen", f"{' '.join(PROGRAM)} keygen")
        script = script.replace("/dns4/first/tcp/4001", f"/ip4/127.0.0.1/tcp/{self.ports['first']}")
        subprocess.run(["sh", "-ec", f"chown() {{ :; }}\n{script}"], check=True)

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start a service by its own command."""
        words = [self._word(name, word) for word in self.said[name]["command"]]
        if words[0] == "serve":
            words += ["--port", str(self.ports[name])]
        data = self._root / self._volumes(name)["/data"]
        environment = {"P2PINFER_DATA_DIR": str(data / "state"), "P2PINFER_CACHE_DIR": str(data / "cache")}
        log = (self._root / f"{name}.log").open("wb")
        return subprocess.Popen(
            [*PROGRAM, *words],
            cwd=self._root / self.said[name]["working_dir"].strip("/"),
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
        )

    def log(self, name: str) -> str:
        """What a service has printed."""
        return (self._root / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def _volumes(self, name: str) -> dict[str, str]:
        """Volumes of a service by where they are mounted."""
        pairs = (volume.split(":") for volume in self.said[name]["volumes"])
        return {path: volume for volume, path, *_ in pairs}

    def _word(self, name: str, word: str) -> str:
        word = word.replace("${MODEL:-tiny-stories}", "tiny-stories")
        word = word.replace("/ip4/0.0.0.0/tcp/4001", f"/ip4/127.0.0.1/tcp/{self.ports[name]}")
        word = word.replace("/run/secrets/keys", str(self._root / "keys"))
        return str(self._root / word.strip("/")) if word.startswith("/swarm/") else word


def ask(services: Services) -> dict[str, Any]:
    """A text through the HTTP API, as soon as there is one."""
    body = json.dumps({"model": "tiny-stories", "prompt": "Once upon a time", "max_tokens": 20}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{services.ports['door']}/v1/completions",
        body,
        {"Authorization": f"Bearer {services.key}", "Content-Type": "application/json"},
    )
    deadline = time.monotonic() + READY_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                told: dict[str, Any] = json.load(answer)
                return told
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def main() -> None:
    with tempfile.TemporaryDirectory() as root, ExitStack() as stack:
        services = Services(Path(root))
        services.set_up()
        for name in services.said:
            if name != "setup":
                process = services.start(name)
                stack.callback(process.wait, 60)
                stack.callback(process.send_signal, signal.SIGINT)
        try:
            told = ask(services)
        except (urllib.error.URLError, ConnectionError):
            for name in services.said:
                print(f"--- {name}", services.log(name) if name != "setup" else "", sep="\n", file=sys.stderr)
            raise
        print(told["choices"][0]["text"].strip())
        print(f"over {len(told['p2pinfer']['route'])} hops: {told['p2pinfer']['route']}")


if __name__ == "__main__":
    main()
