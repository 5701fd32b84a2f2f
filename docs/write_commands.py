"""Writes docs/commands.md: every command's help, and what it printed when it was run.

    python docs/write_commands.py          # `make docs`: from the commands' help and command_outputs.json
    python docs/write_commands.py --run    # `make outputs`: runs the commands first, for a minute

The runs are real. Only the folder that they had for a home, that of the checkout, and the ports that happened
to be free, are told under other names.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from p2pinfer.cli.app import PROGRAM, app

DOCUMENT = Path(__file__).with_name("commands.md")
CHECKOUT = Path(__file__).parents[1]
OUTPUTS = Path(__file__).with_name("command_outputs.json")
WIDTH = 100
BEGIN_S = 60  # s, for a command that serves to begin
HEAD = """\
# Commands

What each command prints, and its help. `make outputs` ran the commands, on the computer described under
`doctor`. Your peer ids, figures and texts will differ.
"""
STORY = '{"prompt": "Tom has a cat.", "completion": " The cat is red and likes to run."}\n'


def commands() -> str:
    """The document, of the recorded outputs and of the help as it is."""
    recorded: dict[str, list[dict[str, str]]] = json.loads(OUTPUTS.read_text(encoding="utf-8"))
    parts = [HEAD]
    for name in app.list_commands(click.Context(app)):
        parts.append(f"## {PROGRAM} {name}\n")
        parts += [
            _fenced("console", f"$ {run['command']}\n{run['output']}") for run in recorded.get(name, [])
        ]
        parts += [_fenced("text", said) for said in _help(app.commands[name], f"{PROGRAM} {name}")]
    return "\n".join(parts)


def _help(found: click.Command, path: str) -> Iterator[str]:
    context = click.Context(found, info_name=path, terminal_width=WIDTH, max_content_width=WIDTH)
    yield found.get_help(context)
    if isinstance(found, click.Group):
        for name in found.list_commands(context):
            yield from _help(found.commands[name], f"{path} {name}")


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"


class Runner:
    """Runs commands in a home of their own, and keeps what they printed."""

    def __init__(self, home: Path) -> None:
        self.recorded: dict[str, list[dict[str, str]]] = {}
        self.ports: dict[int, int] = {}
        self._home = home
        self._environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("XDG_", "P2PINFER_"))
            },
            "HOME": str(home),
            "COLUMNS": str(WIDTH),
            "NO_COLOR": "1",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def port(self, told: int) -> int:
        """A free port, that is told as another one."""
        with socket.socket() as tried:
            tried.bind(("127.0.0.1", 0))
            free: int = tried.getsockname()[1]
        self.ports[free] = told
        return free

    def run(self, name: str, command: str, *, told: str = "") -> str:
        """Run a command of the shell to its end; returns what it printed."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self._home,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BEGIN_S,
        )
        self._keep(name, told or command, done.stdout)
        return done.stdout

    @contextmanager
    def running(self, name: str, command: str, wanted: str) -> Generator[list[str]]:
        """Run a command from its line that says `wanted` until the block ends, when Ctrl-C ends it."""
        log, place = self._home / f"{len(self.ports)}-{name}.log", len(self.recorded.get(name, []))
        with log.open("w") as file:
            process = subprocess.Popen(
                shlex.split(command), cwd=self._home, env=self._environment, stdout=file, stderr=file
            )
        try:
            lines: list[str] = []
            deadline = time.monotonic() + BEGIN_S
            while not any(wanted in line for line in lines):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
                lines = log.read_text().splitlines()
            yield lines
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            self._keep(name, command, log.read_text(), place)

    def _keep(self, name: str, command: str, output: str, place: int | None = None) -> None:
        """Record a run, behind those before it or where it began."""
        run = {"command": self._plain(command), "output": self._plain(output)}
        print(f"$ {run['command']}\n{run['output']}", file=sys.stderr)
        runs = self.recorded.setdefault(name, [])
        runs.insert(len(runs) if place is None else place, run)

    def _plain(self, text: str) -> str:
        for free, told in self.ports.items():
            text = re.sub(rf"\b{free}\b", str(told), text)
        for place, told in ((self._home, "/home/anna"), (CHECKOUT, "/home/anna/p2pinfer")):
            text = text.replace(str(place), told)
        return text.replace("\r", "\n")


def record() -> dict[str, Any]:
    """What all commands print, by command."""
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder))
        (Path(folder) / "stories.jsonl").write_text(STORY * 40)
        runner.run("keygen", "p2pinfer keygen swarm.key")
        runner.run("keygen", "p2pinfer keygen --identity client.key")
        runner.run(
            "plan", "p2pinfer plan meta-llama/Llama-3.3-70B-Instruct --read-rate 50GB/s --memory 24GiB"
        )
        runner.run("models", "p2pinfer models show tiny-stories")
        runner.run("completion", "p2pinfer completion bash | head -3")
        runner.run("generate", 'p2pinfer generate --stats --max-new-tokens 60 "Once upon a time"')
        first = f"p2pinfer node --blocks 0:4 --listen /ip4/127.0.0.1/tcp/{runner.port(4001)} --data-dir one"
        with runner.running("node", first, "--bootstrap ") as lines:
            address = next(filter(None, (re.search(r"/ip4/127\S+", line) for line in lines)))[0].rstrip(".,;")
            join = f"--bootstrap {address}"
            second = (
                f"p2pinfer node --blocks 4:8 --listen /ip4/127.0.0.1/tcp/{runner.port(4002)} --data-dir two"
            )
            with runner.running("node", f"{second} {join}", "--bootstrap "):
                _ask(runner, join)
        runner.run("models", "p2pinfer models")
        runner.run("reputation", "p2pinfer reputation")
        runner.run("doctor", "p2pinfer doctor --report")
        runner.run("man", "p2pinfer man keygen | head -8")
        return runner.recorded


def _ask(runner: Runner, join: str) -> None:
    """Whatever wants a swarm."""
    runner.run("swarm", f"p2pinfer swarm {join}")
    runner.run("node", "p2pinfer node status --data-dir one")
    runner.run("generate", f'p2pinfer generate {join} --audit-rate 1 --stats "The little fox"')
    runner.run("chat", f"printf 'Once upon a time\\n/stats\\n' | p2pinfer chat --max-new-tokens 40 {join}")
    runner.run("tune", f"p2pinfer tune --data stories.jsonl --out my-adapter {join}")
    serve = f"p2pinfer serve --port {runner.port(8000)} {join}"
    with runner.running("serve", serve, "in a browser") as lines:
        url = next(filter(None, (re.search(r"http://\S+/v1", line) for line in lines)))[0]
        said = json.dumps({"model": "tiny-stories", "prompt": "Once upon a time", "max_tokens": 20})
        runner.run("serve", f"curl -s {url}/completions -d '{said}'")


def main() -> None:
    if "--run" in sys.argv[1:]:
        OUTPUTS.write_text(json.dumps(record(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    DOCUMENT.write_text(commands(), encoding="utf-8")


if __name__ == "__main__":
    main()
