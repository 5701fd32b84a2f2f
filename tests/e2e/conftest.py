"""A swarm of real processes, started once."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.text.text import Tokenizer, load_tokenizer
from p2pinfer.node.transport.identity import load_identity

from ..models.conftest import oracle as oracle
from ..models.conftest import write_checkpoint as write_checkpoint
from ..ports import free_port
from .support import NodeProcess, StartNode, Swarm

NODES = 4


@pytest.fixture(scope="session")
def tokenizer(tiny_stories: Path) -> Tokenizer:
    """The bundled model's."""
    return load_tokenizer(tiny_stories)


@pytest.fixture(scope="package")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Generator[Swarm]:
    """Four node processes that each hold the whole bundled model in float32."""
    home = tmp_path_factory.mktemp("swarm")
    # They start all at once: the others know the first one's address before it does.
    meeting_point = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{load_identity(home / '0').peer_id}"
    common = ("--blocks", "0:8", "--dtype", "float32", "--set", f"cache_dir={home}")
    nodes = [NodeProcess(home / "0", *common, "--listen", meeting_point.partition("/p2p/")[0])]
    nodes += [
        NodeProcess(home / str(index), *common, "--bootstrap", meeting_point) for index in range(1, NODES)
    ]
    try:
        peers = [node.ready()[0] for node in nodes]
        yield Swarm(BUNDLED_MODEL, meeting_point, tuple(peers), home)
    finally:
        for node in nodes:
            node.signal(signal.SIGTERM)
        exit_codes = [node.end() for node in nodes]
    said = "".join((home / str(index) / "stderr").read_text(encoding="utf-8") for index in range(NODES))
    assert said == "", said
    assert exit_codes == [0] * NODES


@pytest.fixture
def start_node(swarm: Swarm, tmp_path: Path) -> Iterator[StartNode]:
    """Starts further nodes of the swarm, to be harmed."""
    nodes: list[NodeProcess] = []

    def start(blocks: str = "0:8") -> NodeProcess:
        flags = ("--blocks", blocks, "--dtype", "float32", "--set", f"cache_dir={swarm.home}")
        node = NodeProcess(tmp_path / str(len(nodes)), *flags, "--bootstrap", swarm.address)
        nodes.append(node)
        return node

    yield start
    for node in nodes:
        node.end()
        assert "Traceback" not in node.said_at_last
