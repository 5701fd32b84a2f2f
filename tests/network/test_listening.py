"""Addresses that a host listens on, and how a host ends."""

from __future__ import annotations

import logging
import socket
import threading

import pytest
import trio
from libp2p import new_host
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from multiaddr import Multiaddr

from p2pinfer.errors import AddressUnusable
from p2pinfer.node.host.host import HostConfig, open_host
from p2pinfer.node.transport.identity import new_identity

from .support import ECHO, LOOPBACK, StartHost, echo

# ---------------------------------------------------------------------- starting and stopping


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("/ip4/127.0.0.1", "not of the form"),
        ("nonsense", "not of the form"),
        ("/ip4/300.0.0.1/tcp/1", "not permitted|300"),
        ("/ip4/127.0.0.1/tcp/70000", "65535"),
        ("/ip4/203.0.113.77/tcp/0", "does not have that address"),
        ("/dns4/localhost/tcp/0", "give /ip4"),
        ("/ip4/127.0.0.1/tcp/0/p2p/12D3KooWBny6jbU4SmjVmbw5qgDyZWFvgdKTmkeM2G2zPUvZoHwr", "give /ip4"),
    ],
)
async def test_an_address_that_cannot_be_listened_on_is_named(address: str, why: str) -> None:
    with pytest.raises(AddressUnusable, match=why):
        async with open_host(new_identity(), HostConfig(listen=(address,))):
            pytest.fail("it listens")


async def test_a_port_that_is_taken_is_named_even_by_a_host_of_ours(start_host: StartHost) -> None:
    """Two sockets with SO_REUSEPORT, as libp2p opens them, would share the port without a word."""
    first = await start_host()
    address = first.addrs[0].partition("/p2p/")[0]
    with pytest.raises(AddressUnusable, match="taken"):
        async with open_host(new_identity(), HostConfig(listen=(address,))):
            pytest.fail("it listens")


async def test_an_address_lost_between_check_and_bind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def pass_all(_: object) -> None:
        pass

    monkeypatch.setattr("p2pinfer.node.host.host.check_listen", pass_all)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(AddressUnusable, match="another process has just taken the port"),
    ):
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        async with open_host(new_identity(), HostConfig(listen=(address,))):
            pytest.fail("it listens")


async def test_a_host_ends_at_once_and_leaves_neither_tasks_nor_threads(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also when cancelled in the middle of things, as by Ctrl-C."""
    before = threading.active_count()

    async def live(cancel: bool) -> None:
        with trio.CancelScope() as scope:
            async with (
                open_host(new_identity(), LOOPBACK) as alice,
                open_host(new_identity(), LOOPBACK) as bob,
            ):
                bob.serve(ECHO, echo)
                stream = await alice.open_stream(bob.peer_id, ECHO, bob.addrs)
                await stream.send_all(b"x")
                if cancel:
                    scope.cancel()
                    await trio.sleep_forever()

    with trio.fail_after(60), caplog.at_level(logging.WARNING):
        tasks = len(_all_tasks())
        await live(cancel=False)
        await live(cancel=True)
        await trio.testing.wait_all_tasks_blocked()
        assert len(_all_tasks()) == tasks
    assert threading.active_count() == before
    # libp2p calls a hung-up peer an error; see library_logs.py for what becomes of that.
    assert [record for record in caplog.records if not record.name.startswith("libp2p")] == []
    assert capfd.readouterr().err == ""


def _all_tasks() -> list[trio.lowlevel.Task]:
    root = trio.lowlevel.current_root_task()
    assert root
    found: list[trio.lowlevel.Task] = []
    todo = [root]
    while todo:
        task = todo.pop()
        found.append(task)
        todo += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return found


async def test_an_exception_in_the_body_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with open_host(new_identity(), LOOPBACK):
            raise KeyError("mine")


async def test_plaintext_is_refused(start_host: StartHost) -> None:
    bob = await start_host()
    key_pair = new_identity().key_pair
    plain = new_host(
        key_pair=key_pair, sec_opt={TProtocol(PLAINTEXT_PROTOCOL_ID): InsecureTransport(key_pair)}
    )
    async with plain.run([]):
        address = Multiaddr(bob.addrs[0].partition("/p2p/")[0])
        with pytest.raises(BaseLibp2pError):
            await plain.get_network().dial_addr(address, ID.from_base58(bob.peer_id))
