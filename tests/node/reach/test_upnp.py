"""A port of the router's: mapped, renewed, given back. Real routers are in tests/lab."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from p2pinfer.node.concurrency.pulse import Pulse
from p2pinfer.node.reach import upnp
from p2pinfer.node.reach.upnp import Mapping, NoMapping, open_mapping


class Router:
    """Speaks as `miniupnpc.UPnP` does."""

    lanaddr = "192.168.1.10"
    discoverdelay = 0

    def __init__(
        self, *, taken: tuple[int, ...] = (), permanent_only: bool = False, silent: bool = False
    ) -> None:
        self.taken = taken
        self.permanent_only = permanent_only
        self.silent = silent
        self.refusing = False
        self.mapped: dict[int, tuple[int, int]] = {}
        self.calls = 0
        self.looks = 0
        self.ip = "11.0.0.1"

    def discover(self) -> int:
        if self.silent:
            raise Exception("Success")
        return 1

    def selectigd(self) -> None:
        if self.silent:
            raise Exception("No UPnP device discovered")

    def externalipaddress(self) -> str:
        return self.ip

    def addportmapping(
        self, port: int, protocol: str, host: str, inside: int, why: str, remote: str, lease_s: int
    ) -> bool:
        self.calls += 1
        assert (protocol, host, remote) == ("TCP", self.lanaddr, "")
        if self.permanent_only and lease_s:
            raise Exception("OnlyPermanentLeasesSupported")
        if port in self.taken:
            raise Exception("ConflictInMappingEntry")
        if self.refusing:
            return False
        self.mapped[port] = inside, lease_s
        return True

    def getspecificportmapping(self, port: int, protocol: str) -> object | None:
        self.looks += 1
        return self.mapped.get(port)

    def deleteportmapping(self, port: int, protocol: str) -> bool:
        if self.mapped.pop(port, None) is None:
            raise Exception("NoSuchEntryInArray")
        return True


def mapped(
    inside: int, on_change: Callable[[Mapping], None] = lambda mapping: None, look_now: Pulse | None = None
) -> AbstractAsyncContextManager[Mapping]:
    return open_mapping(inside, on_change, look_now or Pulse())


def use(router: Router, monkeypatch: pytest.MonkeyPatch) -> Router:
    monkeypatch.setattr(upnp, "miniupnpc", SimpleNamespace(UPnP=lambda: router))
    return router


async def test_a_port_is_mapped_for_a_while_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    router = use(Router(), monkeypatch)
    async with mapped(4001) as mapping:
        assert (mapping.ip, mapping.port) == ("11.0.0.1", 4001)
        assert router.mapped == {4001: (4001, upnp.LEASE_S)}
    assert router.mapped == {}


async def test_a_taken_port_gives_way_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    router = use(Router(taken=(4001,)), monkeypatch)
    async with mapped(4001) as mapping:
        assert mapping.port != 4001
        assert router.mapped[mapping.port][0] == 4001


async def test_a_router_that_knows_no_leases_maps_for_good_and_is_cleaned_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = use(Router(permanent_only=True), monkeypatch)
    async with mapped(4001) as mapping:
        assert router.mapped == {4001: (4001, 0)}
        assert mapping.lease_s == 0
    assert router.mapped == {}


@pytest.mark.parametrize("router", [Router(silent=True), Router(taken=tuple(range(65536)))])
async def test_no_router_or_an_unwilling_one_is_no_mapping(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(router, monkeypatch)
    with pytest.raises(NoMapping, match="router"):
        async with mapped(4001):
            pass


async def test_a_lease_is_renewed_and_a_refusal_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    router = use(Router(), monkeypatch)
    monkeypatch.setattr(upnp, "LEASE_S", 0.02)
    with caplog.at_level(logging.WARNING, "p2pinfer"), trio.fail_after(60):
        async with mapped(4001):
            while router.calls < 3:
                await trio.sleep(0.005)
            router.refusing = True
            while "did not renew" not in caplog.text:
                await trio.sleep(0.005)


async def test_a_router_that_has_forgotten_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    router = use(Router(), monkeypatch)
    async with mapped(4001):
        router.mapped.clear()


def test_what_miniupnpc_offers_is_what_is_used() -> None:
    real: Any = pytest.importorskip("miniupnpc", reason="it has no wheel for this Python").UPnP()
    for name in ("discover", "selectigd", "externalipaddress", "addportmapping", "deleteportmapping"):
        assert callable(getattr(real, name))


async def test_without_miniupnpc_there_is_no_mapping_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upnp, "miniupnpc", None)
    with pytest.raises(NoMapping, match=r"lacks miniupnpc.*forward the port by hand"):
        async with mapped(4001):
            pass


async def test_a_router_with_another_address_is_noticed_and_maps_the_port_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router, told = use(Router(), monkeypatch), list[Mapping]()
    monkeypatch.setattr(upnp, "LOOK_S", 0.01)
    with trio.fail_after(60):
        async with mapped(4001, told.append):
            router.ip = "11.0.0.77"
            router.mapped.clear()  # it was restarted
            while not told:
                await trio.sleep(0.005)
            assert (told[0].ip, told[0].port) == ("11.0.0.77", 4001)
            assert router.mapped == {4001: (4001, upnp.LEASE_S)}


async def test_a_router_is_looked_at_at_once_when_something_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    router, look_now = use(Router(), monkeypatch), Pulse()
    monkeypatch.setattr(upnp, "LOOK_S", 1000.0)
    monkeypatch.setattr(upnp, "REMAP_S", 0.0)
    with trio.fail_after(60):
        async with mapped(4001, look_now=look_now):
            await trio.testing.wait_all_tasks_blocked()
            router.mapped.clear()
            while not router.mapped:
                look_now.fire()
                await trio.sleep(0.005)


async def test_a_router_that_comes_back_elsewhere_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart it may listen for questions at another port: the former one refuses."""
    first, second = Router(), Router()
    second.ip = "11.0.0.78"
    routers = [second, first]
    monkeypatch.setattr(upnp, "miniupnpc", SimpleNamespace(UPnP=lambda: routers.pop() if routers else second))
    monkeypatch.setattr(upnp, "LOOK_S", 0.01)
    told = list[Mapping]()

    def gone() -> str:
        raise OSError("connection refused")

    with trio.fail_after(60):
        async with mapped(4001, told.append):
            monkeypatch.setattr(first, "externalipaddress", gone)
            while not told:
                await trio.sleep(0.005)
    assert told[0].ip == "11.0.0.78"
