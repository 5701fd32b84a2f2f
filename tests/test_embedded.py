"""Three node processes of our own: that they serve, and that nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import trio

from p2pinfer import embedded
from p2pinfer.client import Client
from p2pinfer.embedded import (
    client_host_config,
    embedded_spans,
    may_embed,
    open_embedded_swarm,
    swarm_in_reach,
)
from p2pinfer.errors import LocalError, PeerUnreachable
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host_config import HostConfig
from p2pinfer.routing.announcement import Announcement

pytestmark = pytest.mark.slow

LOOPBACK = client_host_config(HostConfig(), embedding=True)


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the nodes' folders are made, and an empty place for everything else."""
    homes = tmp_path / "homes"
    homes.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(homes))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return homes


def client(tmp_path: Path) -> Client:
    return Client(host_config=LOOPBACK, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_three_processes_tell_a_story_and_leave_nothing_behind(homes: Path, tmp_path: Path) -> None:
    counted: list[tuple[int, int]] = []
    async with client(tmp_path) as alone:
        generation = alone.generate("Once upon a time", max_new_tokens=8)
        in_reach = swarm_in_reach(
            alone, embedding=True, on_embedding=lambda ready, total: counted.append((ready, total))
        )
        async with in_reach:
            assert len(list(homes.glob("p2pinfer-*"))) == 1
            asked_at = trio.current_time()
            tokens = [token async for token in generation]
            took_s = trio.current_time() - asked_at
    assert len(tokens) == 8
    assert 0 < generation.result.timings.first_token_s < took_s, "starting the nodes does not count"
    assert [str(hop.span) for hop in generation.result.route] == ["0:3", "3:5", "5:8"]
    assert counted == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert list(homes.glob("p2pinfer-*")) == []


async def test_a_node_that_will_not_go_is_killed(
    homes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "LEAVE_TIMEOUT_S", 0.5)
    async with client(tmp_path) as alone:
        swarm = open_embedded_swarm(alone.member.addrs, model=BUNDLED_MODEL, spans=[BlockSpan(0, 1)])
        async with swarm as (node,):
            os.kill(node.process.pid, signal.SIGSTOP)
    assert node.process.returncode == -signal.SIGKILL
    assert is_gone(node.process.pid)
    assert list(homes.glob("p2pinfer-*")) == []


def test_nodes_do_not_outlive_a_parent_that_was_killed(homes: Path) -> None:
    script = """
import trio
from p2pinfer.embedded import open_embedded_swarm
from p2pinfer.models.span import BlockSpan

async def main():
    async with open_embedded_swarm([], model="tiny-stories", spans=[BlockSpan(0, 1)] * 2) as nodes:
        print(*(node.process.pid for node in nodes), flush=True)
        await trio.sleep_forever()

trio.run(main)
"""
    environment = {**os.environ, "TMPDIR": str(homes)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        nodes = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(nodes) == 2
    _, left = psutil.wait_procs(nodes, timeout=90)
    assert left == []


async def test_a_node_that_cannot_start_says_why(homes: Path) -> None:
    swarm = open_embedded_swarm([], model="no/such/folder", spans=[BlockSpan(0, 1)])
    with pytest.raises(LocalError, match=r"blocks 0:1 ended: p2pinfer: there is no folder 'no/such/folder'"):
        async with swarm:
            pytest.fail("it cannot serve")
    assert list(homes.glob("p2pinfer-*")) == []


async def test_a_node_that_takes_too_long_is_given_up(homes: Path) -> None:
    swarm = open_embedded_swarm([], model=BUNDLED_MODEL, spans=[BlockSpan(0, 1)], start_timeout_s=0.05)
    with pytest.raises(LocalError, match=r"blocks 0:1 was not ready in 0\.05 s: it said nothing"):
        async with swarm:
            pytest.fail("it cannot serve yet")
    assert list(homes.glob("p2pinfer-*")) == []


async def test_a_cancelled_start_ends_the_nodes(homes: Path) -> None:
    with trio.move_on_after(0.3) as scope:
        async with open_embedded_swarm([], model=BUNDLED_MODEL):
            pytest.fail("they cannot serve yet")
    assert scope.cancelled_caught
    assert list(homes.glob("p2pinfer-*")) == []


async def test_nodes_of_our_own_do_not_stand_in_for_a_swarm_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "BOOTSTRAP_TIMEOUT_S", 0.1)
    async with client(tmp_path) as alone:
        with pytest.raises(PeerUnreachable, match="no peer of a swarm answered"):
            async with swarm_in_reach(alone, embedding=False):
                pytest.fail("there is nobody")


async def test_a_swarm_in_reach_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was named, anybody who answers is swarm enough; else somebody has to serve the model."""
    async with client(tmp_path) as first:
        spec = first.spec
        for embedding in (False, True):
            if embedding:
                offer = Announcement(
                    *(first.member.peer_id, spec.model, spec.revision, BlockSpan(0, 8), "float32", 1.0, 1, 1)
                )
                await first.member.announce(offer)
            second = Client(
                bootstrap=first.member.addrs, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache"
            )
            async with second, swarm_in_reach(second, embedding=embedding):
                assert second.member.host.connected_peers() == [first.member.peer_id]


async def test_nodes_that_stand_in_for_a_swarm_keep_to_their_client(homes: Path, tmp_path: Path) -> None:
    async with client(tmp_path) as other, client(tmp_path) as alone:
        await alone.member.host.connect(other.member.peer_id, other.member.addrs)
        async with swarm_in_reach(alone, embedding=True):
            while len(alone.peers()) < 3:
                await alone.member.table_changed.wait()
            nodes = {peer.announcement.peer_id for peer in alone.peers()}
            assert set(alone.member.host.connected_peers()) == nodes
            with pytest.raises(PeerUnreachable):
                await other.member.host.connect(alone.member.peer_id, alone.member.addrs)
                await other.member.host.open_stream(alone.member.peer_id, "/ipfs/ping/1.0.0")
        assert other.member.models() == {}


@pytest.mark.parametrize(
    ("blocks", "spans"),
    [
        (1, ["0:1"]),
        (2, ["0:1", "1:2"]),
        (3, ["0:1", "1:3"]),
        (8, ["0:3", "3:5", "5:8"]),
        (30, ["0:11", "11:18", "18:30"]),
    ],
)
def test_any_number_of_blocks_is_shared_out(blocks: int, spans: list[str]) -> None:
    assert [str(span) for span in embedded_spans(blocks)] == spans


def test_only_a_model_that_is_here_without_a_named_swarm_may_be_embedded(tmp_path: Path) -> None:
    assert may_embed(str(tmp_path), [], HostConfig())
    assert not may_embed(str(tmp_path), ["/ip4/192.0.2.1/tcp/1"], HostConfig())
    assert not may_embed("", [], HostConfig())
    assert may_embed(BUNDLED_MODEL, [], HostConfig())
    assert not may_embed(BUNDLED_MODEL, ["/ip4/192.0.2.1/tcp/1"], HostConfig())
    assert not may_embed(BUNDLED_MODEL, [], HostConfig(swarm_key=Path("swarm.key")))
    assert not may_embed(BUNDLED_MODEL, [], HostConfig(allow=("12D3KooW",)))
    assert not may_embed("some/model", [], HostConfig())
    assert client_host_config(HostConfig(), embedding=False).listen == ()
