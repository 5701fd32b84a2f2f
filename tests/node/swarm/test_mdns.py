"""What is said of a peer in the local network, and that two of them find each other."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, Final

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from zeroconf import ServiceStateChange

from p2pinfer.node.swarm import mdns
from p2pinfer.node.swarm.mdns import keep_looking_around, peer_of, service_of
from p2pinfer.node.transport.identity import new_identity

PEER = new_identity().peer_id
LOOPBACK: Final = ["127.0.0.1"]
ADDRS = (f"/ip4/192.168.1.10/tcp/4001/p2p/{PEER}", f"/ip6/2abc::1/tcp/4002/p2p/{PEER}")
TEXT = service_of(ADDRS).text


def test_what_one_advertises_another_understands() -> None:
    assert peer_of(service_of(ADDRS).text) == (PEER, ADDRS)


def test_ways_through_relays_are_of_no_use_in_the_local_network() -> None:
    relayed = f"/ip4/11.0.0.1/tcp/1/p2p/{PEER}/p2p-circuit/p2p/{PEER}"
    assert peer_of(service_of([relayed, *ADDRS]).text) == (PEER, ADDRS)
    assert peer_of(service_of([relayed]).text) is None


def test_addresses_of_a_second_peer_are_left_out() -> None:
    other = f"/ip4/192.168.1.11/tcp/4001/p2p/{new_identity().peer_id}"
    assert peer_of(service_of([*ADDRS, other]).text) == (PEER, ADDRS)


@given(st.binary(max_size=300))
def test_nonsense_is_nobody(text: bytes) -> None:
    assert peer_of(text) is None


def ignore(peer_id: str, addrs: tuple[str, ...]) -> None: ...


class Multicast:
    """Stands in for zeroconf: `announce` is what its thread does when somebody is there."""

    def __init__(self, **options: object) -> None:
        self.registered: list[Any] = []
        self.closed = False
        self.texts: dict[str, bytes | None] = {}
        self.handler: Callable[..., None]

    def register_service(self, info: Any) -> None:
        self.registered.append(info)

    def info(self, kind: str, name: str, **_: object) -> Any:
        def request(network: Multicast, timeout_ms: int) -> bool:
            return False  # as for somebody without an address record

        return SimpleNamespace(text=self.texts.get(name), request=request)

    def close(self) -> None:
        self.closed = True

    def announce(self, name: str, text: bytes | None, change: Any = ServiceStateChange.Added) -> None:
        self.texts[name] = text
        self.handler(zeroconf=self, service_type=mdns.SERVICE, name=name, state_change=change)


@pytest.fixture
def multicast(monkeypatch: pytest.MonkeyPatch) -> Multicast:
    network = Multicast()

    def browse(zeroconf: Multicast, kind: str, handlers: list[Callable[..., None]]) -> None:
        network.handler = handlers[0]

    def start(**options: object) -> Multicast:
        return network

    monkeypatch.setattr(mdns, "Zeroconf", start)
    monkeypatch.setattr(mdns, "ServiceBrowser", browse)
    monkeypatch.setattr(mdns, "ServiceInfo", network.info)
    return network


async def test_every_peer_is_told_of_once_and_the_end_is_clean(
    multicast: Multicast, nursery: trio.Nursery
) -> None:
    found: list[tuple[str, tuple[str, ...]]] = []

    def note(peer_id: str, addrs: tuple[str, ...]) -> None:
        found.append((peer_id, addrs))

    nursery.start_soon(keep_looking_around, ADDRS, note)
    while not hasattr(multicast, "handler"):
        await trio.sleep(0.001)
    for change in (ServiceStateChange.Added, ServiceStateChange.Updated, ServiceStateChange.Removed):
        await trio.to_thread.run_sync(multicast.announce, "a", TEXT, change)
    await trio.to_thread.run_sync(multicast.announce, "b", None)
    await trio.to_thread.run_sync(multicast.announce, "c", b"\x03abc")
    while not found:
        await trio.sleep(0.001)
    assert found == [(PEER, ADDRS)]
    assert len(multicast.registered) == 1
    nursery.cancel_scope.cancel()


async def test_who_only_looks_advertises_nothing(multicast: Multicast, nursery: trio.Nursery) -> None:
    nursery.start_soon(keep_looking_around, (), ignore)
    while not hasattr(multicast, "handler"):
        await trio.sleep(0.001)
    assert multicast.registered == []
    nursery.cancel_scope.cancel()


async def test_a_network_without_multicast_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**options: object) -> None:
        raise OSError("no such device")

    monkeypatch.setattr(mdns, "Zeroconf", refuse)
    with caplog.at_level(logging.INFO, "p2pinfer"), trio.fail_after(60):
        await keep_looking_around(ADDRS, ignore)
    assert "no such device" in caplog.text


async def test_a_browser_that_cannot_start_leaves_nothing_open(
    multicast: Multicast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("not permitted")

    monkeypatch.setattr(mdns, "ServiceBrowser", refuse)
    with trio.fail_after(60):
        await keep_looking_around(ADDRS, ignore)
    assert multicast.closed


@pytest.mark.parametrize("others_addrs", [(), (f"/ip4/127.0.0.1/tcp/4003/p2p/{new_identity().peer_id}",)])
async def test_hosts_on_one_wire_find_each_other(
    others_addrs: tuple[str, ...], nursery: trio.Nursery
) -> None:
    """With multicast as it is; a peer that only looks finds as well."""
    peer_id = new_identity().peer_id
    addrs = (f"/ip4/127.0.0.1/tcp/4001/p2p/{peer_id}",)
    met = trio.Event()

    def note(found: str, at: tuple[str, ...]) -> None:
        if found == peer_id and at == addrs:
            met.set()

    nursery.start_soon(partial(keep_looking_around, addrs, ignore, interfaces=LOOPBACK))
    nursery.start_soon(partial(keep_looking_around, others_addrs, note, interfaces=LOOPBACK))
    with trio.fail_after(30):
        await met.wait()
    nursery.cancel_scope.cancel()
