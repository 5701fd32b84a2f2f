"""Two models in one swarm, and nodes that come back: the command lines of the README, as processes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from p2pinfer.config import environment_without_settings
from p2pinfer.node.host.last_ports import remember_ports

from ..forking import fork_server
from ..ports import free_port
from .support import PATIENCE_S, NodeProcess, until

pytestmark = pytest.mark.slow

safetensors_torch: Any = safetensors.torch  # its stubs are partly unknown
QUIET = ("--set", "host.mdns=false", "--set", "host.upnp=false")


@dataclass(frozen=True)
class Place:
    """A folder to work in, with nodes that end with the test."""

    home: Path
    nodes: list[NodeProcess]

    def start(self, name: str, *flags: str) -> NodeProcess:
        cache = ("--set", f"cache_dir={self.home / 'cache'}")
        node = NodeProcess(self.home / name, *QUIET, *cache, *flags)
        self.nodes.append(node)
        return node

    def run(self, command: str, *flags: str) -> subprocess.CompletedProcess[str]:
        environ = environment_without_settings()
        environ |= {f"XDG_{kind}_HOME": str(self.home / kind) for kind in ("DATA", "CONFIG", "CACHE")}
        words = [*shlex.split(command), *flags]
        return fork_server().run(words, cwd=self.home, env=environ, timeout=PATIENCE_S)


@pytest.fixture
def place(tmp_path: Path) -> Generator[Place]:
    place = Place(tmp_path, [])
    try:
        yield place
    finally:
        for node in place.nodes:
            node.process.kill()
            node.end()


Copy = Callable[[str], Path]


@pytest.fixture
def copy(tiny_stories: Path, tmp_path: Path) -> Copy:
    """Models with weights that are slightly other ones than the bundled model's."""

    def make(name: str) -> Path:
        folder = shutil.copytree(tiny_stories, tmp_path / name)
        shard = min(folder.glob("*.safetensors"))
        tensors = safetensors_torch.load_file(shard)
        first = min(tensors)
        safetensors_torch.save_file(
            {**tensors, first: tensors[first] * 0.99}, shard, metadata={"format": "pt"}
        )
        return folder

    return make


def test_a_second_model_is_joined_and_asked_through_any_node_of_the_first(place: Place, copy: Copy) -> None:
    copy("other")
    _, ordinary = place.start("first", "--blocks", "0:8").ready()
    halves = [
        place.start(
            f"half-{blocks[0]}",
            *("--model", str(place.home / "other"), "--blocks", blocks, "--bootstrap", ordinary),
        )
        for blocks in ("0:4", "4:8")
    ]
    for half in halves:
        half.ready()
    told = place.run(f"generate --model other --bootstrap {ordinary} --max-new-tokens 4", *QUIET, "Once upon")
    assert told.returncode == 0, told.stderr
    assert told.stdout

    # All models are listed, without the files of any.
    shutil.rmtree(place.home / "other")
    listed = json.loads(place.run(f"swarm --json --bootstrap {ordinary}", *QUIET).stdout)
    found = {(each["model"], each["num_blocks"], len(each["peers"])) for each in listed["models"]}
    assert found == {("tiny-stories", 8, 1), ("other", 8, 2)}
    assert all(each["missing"] == [] for each in listed["models"])
    shown = place.run(f"swarm --bootstrap {ordinary}", *QUIET).stdout
    assert shown.count("all 8 blocks are served") == 2


def test_who_asks_for_what_nobody_serves_is_told_what_is_and_can_type_it(place: Place, copy: Copy) -> None:
    third = copy("third's")  # a name that a shell would trip over
    _, address = place.start("first", "--blocks", "0:8").ready()
    question = f"generate --model {shlex.quote(str(third))} --bootstrap {address}"
    waiting = ("--set", "client.find_timeout_s=1", *QUIET)
    refused = place.run(question, *waiting, "Once")
    assert refused.returncode == 1
    said = refused.stderr
    # Both pieces of advice, as they stand: what is served answers, and the missing blocks get served.
    asks = re.search(r"this swarm serves tiny-stories \(all 8 blocks.*?`p2pinfer ([^`]*)` asks for it", said)
    serves = re.search(r"nobody serves blocks 0:8; `p2pinfer node ([^`]*)` would", said)
    assert asks is not None, said
    assert serves is not None, said
    assert place.run(asks[1], "--max-new-tokens", "4", *QUIET).returncode == 0
    place.start("third-node", *shlex.split(serves[1])).ready()
    assert place.run(question, "--max-new-tokens", "4", *QUIET, "Once").returncode == 0


def test_without_the_usual_model_in_reach_it_runs_here_and_says_what_is_served(
    place: Place, copy: Copy
) -> None:
    folder = copy("other")
    node = place.start("first", "--model", str(folder), "--blocks", "0:8")
    _, address = node.ready()
    (place.home / "bootstrap_peers.txt").write_text(address)
    told = place.run("generate --max-new-tokens 4", *QUIET, "Once upon a time")
    assert told.returncode == 0, told.stderr
    assert told.stdout
    assert "this swarm serves other (all 8 blocks, revision" in told.stderr
    seen = json.loads(place.run("swarm --json", *QUIET).stdout)
    assert [each["model"] for each in seen["models"]] == ["other"], "what ran here was not told to others"


def test_a_model_from_a_folder_runs_alone(place: Place, copy: Copy) -> None:
    copy("mine")
    told = place.run("generate --model mine --max-new-tokens 4 --json", *QUIET, "Once upon a time")
    assert told.returncode == 0, told.stderr
    assert [hop["blocks"] for hop in json.loads(told.stdout)["route"]] == [[0, 3], [3, 5], [5, 8]]


def test_nodes_find_each_other_again_after_either_was_killed(place: Place) -> None:
    def generates(address: str) -> bool:
        told = place.run(f"generate --bootstrap {address} --max-new-tokens 4", *QUIET, "Once")
        return told.returncode == 0

    for name in ("first", "second"):  # or another process could be given the port of one that is dead
        (place.home / name).mkdir()
        remember_ports(place.home / name, [f"/ip4/127.0.0.1/tcp/{free_port()}"])
    first = place.start("first", "--blocks", "0:4")
    _, address = first.ready()
    second = place.start("second", "--blocks", "4:8", "--bootstrap", address)
    second_address = second.ready()[1]
    assert generates(address)
    for node in (first, second):
        node.process.kill()
        node.end()
    # Neither is told of the other any more.
    first, second = place.start("first", "--blocks", "0:4"), place.start("second", "--blocks", "4:8")
    assert first.ready()[1] == address
    assert second.ready()[1] == second_address
    assert generates(address)
    # And where the first one's port is taken, it looks for the second one, which had come to it.
    first.process.kill()
    first.end()
    port = int(address.split("/")[4])
    with socket.create_server(("127.0.0.1", port)):
        first = place.start("first", "--blocks", "0:4")
        moved = first.ready()[1]
        assert moved != address
        assert "takes another one" in first.said()
        assert generates(moved)


def test_an_announced_address_is_told_to_all(place: Place) -> None:
    announced = "/ip4/203.0.113.7/tcp/14001", "/dns4/node.example.org/tcp/4001"
    flags = [word for each in announced for word in ("--announce", each)]
    node = place.start("first", "--blocks", "0:8", *flags)
    event = node.wait_for("ready")
    told = [f"{each}/p2p/{event['peer_id']}" for each in announced]
    assert event["addrs"][:2] == told
    (model,) = json.loads(place.run(f"swarm --json --bootstrap {event['addrs'][2]}", *QUIET).stdout)["models"]
    assert model["peers"][0]["addrs"][:2] == told


def test_a_copied_data_directory_ends_one_of_the_two_nodes(place: Place) -> None:
    """They start within seconds of each other, so chance says which. tests/network has a later one."""
    first = place.start("first", "--blocks", "0:4")
    peer_id, address = first.ready()
    shutil.copytree(place.home / "first", place.home / "copy")
    second = place.start("copy", "--blocks", "4:8", "--bootstrap", address)
    until(lambda: first.process.poll() is not None or second.process.poll() is not None)
    ended, running = (first, second) if first.process.poll() is not None else (second, first)
    assert ended.process.wait() == 1
    assert f"another node already runs as {peer_id}" in ended.said()
    assert "--data-dir DIR" in ended.said()
    assert running.process.poll() is None
    until(lambda: "has a copy of this node's identity" in running.said())
