"""Whatever is asked wrongly, or is not there, ends in one clear line, as the user would see it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ..cli.support import spoken
from ..forking import ForkServer
from .support import PATIENCE_S, NodeProcess, Swarm

pytestmark = pytest.mark.slow

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWHRDh3yL8gix9dCiwmrLZahcKY8Ae7ovYj3Tb1iAg6gpz"
WRONG, FAILED = 2, 1


@dataclass(frozen=True)
class Case:
    """A command line with its place-holders, and what becomes of it."""

    argv: list[str]
    exit_code: int
    complaint: str  # a regular expression
    stdin: bytes = b""
    environ: dict[str, str] = field(default_factory=dict[str, str])


def generate(*argv: str, exit_code: int = WRONG, says: str, stdin: bytes = b"", **environ: str) -> Case:
    return Case(["generate", *argv, "Once upon a time"], exit_code, says, stdin, environ)


def node(*argv: str, exit_code: int = WRONG, says: str) -> Case:
    return Case(["node", *argv], exit_code, says)


CASES = {
    # ------------------------------------------------------------------ the model
    "no such folder": generate("--model", "no/such/folder", exit_code=FAILED, says="there is no folder"),
    "no such folder to serve": node("--model", "no/such/folder", exit_code=FAILED, says="there is no folder"),
    "a hub out of reach": generate("--model", "owner/name", exit_code=FAILED, says="owner/name"),
    "a file for a folder": node(
        "--model", "{models}/file", exit_code=FAILED, says="is a file; name a GGUF file, or the folder"
    ),
    "an empty folder": node("--model", "{models}/empty", exit_code=FAILED, says="empty"),
    "a truncated shard": node("--model", "{models}/truncated", exit_code=FAILED, says="model-00002-of-00003"),
    "a missing shard": node("--model", "{models}/missing", exit_code=FAILED, says="model-00003-of-00003"),
    "a config that is no JSON": generate("--model", "{models}/no-json", exit_code=FAILED, says="config.json"),
    "a family nobody knows": node("--model", "{models}/family", exit_code=FAILED, says="gpt_neox"),
    "pickled weights": node("--model", "{models}/pickled", exit_code=FAILED, says="safetensors"),
    "no tokenizer": generate("--model", "{models}/mute", exit_code=FAILED, says=r"tokenizer\.json"),
    "tensors of another shape": node("--model", "{models}/misshapen", exit_code=FAILED, says="shape"),
    # ------------------------------------------------------------------ the blocks
    "blocks past the end": node("--blocks", "4:9", says="has 8 blocks, 0:8; 4:9 is not among them"),
    "blocks backwards": node("--blocks", "4:2", says="'4:2' is not a span of blocks"),
    "blocks that are none": node("--blocks", "all", says="'all' is not a span of blocks"),
    "no blocks to serve": node("--num-blocks", "0", says="--num-blocks is 0"),
    "two answers to one question": node("--blocks", "0:4", "--num-blocks", "2", says="give one of them"),
    # ------------------------------------------------------------------ addresses
    "a port in use": node(
        "--blocks", "0:1", "--listen", "{taken}", exit_code=FAILED, says="the port is taken"
    ),
    "an address elsewhere": node(
        "--blocks", "0:1", "--listen", "/ip4/192.0.2.1/tcp/0", exit_code=FAILED, says=r"192\.0\.2\.1"
    ),
    "an address that is none": node("--listen", "localhost:4001", exit_code=FAILED, says="localhost:4001"),
    "a bootstrap peer that is none": generate(
        "--bootstrap", "nowhere", says="--bootstrap: 'nowhere' is not of"
    ),
    "a bootstrap peer without a name": generate("--bootstrap", "/ip4/127.0.0.1/tcp/1", says="--bootstrap: "),
    "a bootstrap port that is none": generate(
        "--bootstrap", NOBODY.replace("/9/", "/99999/"), says="--bootstrap: .*99999"
    ),
    "nobody to look at": Case(["swarm"], FAILED, "no peer of a swarm answered; name one"),
    # ------------------------------------------------------------------ the way
    "blocks that nobody serves": generate(
        *("--bootstrap", "{swarm}", "--model", "{models}/another", "--set", "client.find_timeout_s=0.2"),
        exit_code=FAILED,
        says=r"nobody serves blocks 0:8; `p2pinfer node --model \S+ --bootstrap \S+ --blocks 0:8` would",
    ),
    "a full cache": generate(
        *("--bootstrap", "{full}", "--model", "{models}/third", "--set", "client.find_timeout_s=0.2"),
        exit_code=FAILED,
        says="blocks 0:8 are served only by peers without cache for 69 tokens; try again soon",
    ),
    "a policy nobody knows": generate(
        "--policy", "slowest", says="'slowest' is no routing policy; built in are"
    ),
    "a policy without a module": generate("--policy", "no_such:Own", says="there is no module no_such"),
    "a policy that is broken": generate("--policy", "torn:Own", says="cannot be loaded: SyntaxError"),
    # ------------------------------------------------------------------ the text
    "a prompt too long": Case(
        ["generate", "word " * 2000], FAILED, "tokens long, but the context of tiny-stories is 1024 tokens"
    ),
    "a prompt that is no text": Case(["generate", "-"], WRONG, "is not UTF-8 text", b"\xff\xfe"),
    "an empty prompt, and no token to begin with": Case(
        ["generate", "--model", "{models}/beginless", ""],
        WRONG,
        "the prompt is empty and .* has no start token",
    ),
    "an empty standard input, and no token to begin with": Case(
        ["generate", "--model", "{models}/beginless", "-"],
        WRONG,
        "the prompt is empty and .* has no start token",
    ),
    "no prompt": Case(["generate"], WRONG, "give either PROMPT or --resume"),
    "no new tokens": generate("--max-new-tokens", "0", says="max_new_tokens is 0"),
    "fewer than no new tokens": generate("--max-new-tokens", "-1", says="max_new_tokens is -1"),
    "a number that is none": generate("--max-new-tokens", "many", says="must be a whole number, not 'many'"),
    "a share above one": generate("--top-p", "7", says=r"top_p is 7\.0"),
    "a cold below absolute zero": generate("--temperature", "-1", says=r"temperature is -1\.0"),
    "a stop that is everywhere": generate("--stop", "", says="a stop string is empty"),
    # ------------------------------------------------------------------ settings
    "an option nobody knows": generate("--tempreature", "1", says="No such option"),
    "a command nobody knows": Case(["generrate", "x"], WRONG, "No such command"),
    "a file that is no TOML": generate("--config", "{models}/torn.toml", says=r"torn\.toml"),
    "a file that is not there": generate("--config", "no.toml", says=r"no\.toml does not exist"),
    "a setting nobody knows": generate(
        "--config", "{models}/typo.toml", says="did you mean generation.top_p"
    ),
    "a setting of the wrong kind": generate("--config", "{models}/kind.toml", says="top_p must be a number"),
    "a variable nobody knows": generate(says="P2PINFER_MODLE.*did you mean", P2PINFER_MODLE="x"),
    "a variable of the wrong kind": generate(
        says="temperature must be a number", P2PINFER_GENERATION__TEMPERATURE="hot"
    ),
    "no chunk at all": generate("--set", "session.chunk_tokens=0", says=r"\[session\] chunk_tokens is 0"),
    "no attempt at all": generate("--set", "client.max_attempts=0", says=r"\[client\] max_attempts is 0"),
    "no connection at all": node(
        "--set", "host.max_connections=0", says=r"\[host\] max_connections must be positive"
    ),
    "no session at all": node("--set", "serve.max_sessions=0", says=r"\[serve\] max_sessions is 0"),
    "a lifetime nobody accepts": node(
        "--set", "serve.announce_ttl_s=1000", says=r"\[serve\] announce_ttl_s is 1000"
    ),
    "an interval below the gap": node(
        "--set", "serve.announce_interval_s=1", says=r"announce_interval_s is 1"
    ),
    "a page of nothing": node("--blocks", "0:1", "--set", "compute.page_tokens=0", says="page_tokens is 0"),
    "fewer than no threads": node("--blocks", "0:1", "--set", "compute.threads=-1", says="threads is -1"),
    "a cache too small": node(
        "--blocks", "0:1", "--set", "compute.cache_bytes=1", exit_code=FAILED, says="the KV cache has"
    ),
    "a dtype nobody knows": node("--blocks", "0:1", "--dtype", "int4", says="int4"),
    "a device nobody knows": node("--blocks", "0:1", "--device", "tpu", says="tpu"),
    "a dtype nobody knows for the ends": generate("--set", "client.dtype=int4", says="int4"),
    # ------------------------------------------------------------------ this computer
    "a data directory that is a file": node("--data-dir", "{models}/file", exit_code=FAILED, says="file"),
    "a damaged identity": node("--data-dir", "{models}/damaged", exit_code=FAILED, says="damaged"),
}


@pytest.fixture(scope="module")
def models(tiny_stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with models that lack something, and files that are not what they seem."""
    home = tmp_path_factory.mktemp("models")

    def copy(name: str, **config: object) -> Path:
        folder = home / name
        shutil.copytree(tiny_stories, folder)
        told = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**told, **config}))
        return folder

    (home / "file").write_text("")
    (home / "empty").mkdir()
    shard = copy("truncated") / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:100_000])
    (copy("missing") / "model-00003-of-00003.safetensors").unlink()
    (copy("no-json") / "config.json").write_text("{")
    copy("family", model_type="gpt_neox")
    (home / "pickled").mkdir()
    shutil.copy(tiny_stories / "config.json", home / "pickled")
    (home / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (copy("mute") / "tokenizer.json").unlink()
    path = copy("beginless") / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": None}))
    copy("misshapen", intermediate_size=860)
    copy("another", rope_theta=20000.0)
    copy("third", rope_theta=30000.0)
    (home / "torn.toml").write_text("[generation\n")
    (home / "typo.toml").write_text("[generation]\ntop_pp = 1\n")
    (home / "kind.toml").write_text('[generation]\ntop_p = "all"\n')
    (home / "torn.py").write_text("class Own(:\n")
    (home / "wild.py").write_text(
        "from p2pinfer import BlockSpan, Hop, Route, RoutingPolicy\n"
        "class Own(RoutingPolicy):\n"
        "    def choose_routes(self, candidates, request, view):\n"
        "        return 1 / 0\n"
        "class Liar(RoutingPolicy):\n"
        "    def choose_routes(self, candidates, request, view):\n"
        "        return [Route((Hop('nobody', BlockSpan(0, 8)),))]\n"
    )
    (home / "damaged").mkdir()
    for name in ("identity", "identity.key", "identity.pem"):
        (home / "damaged" / name).write_bytes(b"not a key")
    return home


@pytest.fixture(scope="module")
def taken() -> Iterator[str]:
    """An address that somebody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"/ip4/127.0.0.1/tcp/{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def full(models: Path, swarm: Swarm) -> Iterator[str]:
    """Where a node has room for 64 tokens."""
    flags = ("--model", str(models / "third"), "--blocks", "0:8", "--dtype", "float32")
    node = NodeProcess(models / "full", *flags, "--set", "compute.cache_bytes=700000")
    yield node.ready()[1]
    node.end()


@dataclass(frozen=True)
class Runner:
    """Runs commands as a user without any configuration would, where the broken models are."""

    server: ForkServer
    home: Path

    def run(self, case: Case, places: dict[str, str]) -> subprocess.CompletedProcess[str]:
        content = self.home / "stdin"
        content.write_bytes(case.stdin)
        with content.open("rb") as stdin:
            return self.server.run(
                [word.format_map(places) if word.startswith("{") else word for word in case.argv],
                cwd=Path(places["models"]),
                env={**environment(self.home), **case.environ},
                stdin=stdin,
                timeout=PATIENCE_S,
            )


def environment(home: Path) -> dict[str, str]:
    """Nothing is configured, and no hub is in reach."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("P2PINFER_")}
    environ |= {f"XDG_{kind}_HOME": str(home / kind.lower()) for kind in ("DATA", "CONFIG", "CACHE")}
    return {**environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(home / "hub")}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    home = tmp_path_factory.mktemp("home")
    server = ForkServer(environment(home))
    yield Runner(server, home)
    server.close()


@pytest.fixture(scope="module")
def places(models: Path, swarm: Swarm, taken: str, full: str) -> dict[str, str]:
    """What the place-holders of a command line stand for."""
    return {"models": str(models), "swarm": swarm.address, "taken": taken, "full": full}


@pytest.mark.parametrize("name", CASES)
def test_it_is_said_in_one_line(name: str, runner: Runner, places: dict[str, str]) -> None:
    case = CASES[name]
    ended = runner.run(case, places)
    said = spoken(ended.stderr)
    assert "Traceback" not in said
    assert said.startswith("p2pinfer: ")
    assert said.count("\n") == 1, said
    assert re.search(case.complaint, said), said
    assert ended.returncode == case.exit_code
    if case.argv[0] != "node":
        assert ended.stdout == ""


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        ("wild:Own", "policy Own raised ZeroDivisionError: division by zero; the policy RiskAdjusted"),
        ("wild:Liar", "policy Liar: .* which is not a candidate; the policy RiskAdjusted"),
    ],
)
def test_a_policy_that_fails_costs_a_line_and_no_text(
    policy: str, complaint: str, runner: Runner, places: dict[str, str]
) -> None:
    ended = runner.run(generate("--bootstrap", "{swarm}", "--policy", policy, says=complaint), places)
    said = spoken(ended.stderr)
    assert ended.returncode == 0
    assert ended.stdout.startswith(", there was")
    assert re.search(complaint, said)
    assert "Traceback" not in said
