"""A port of the router's: mapped, renewed, given back. Real routers are in tests/lab."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from p2pinfer.node.reach import upnp
from p2pinfer.node.reach.upnp import NoMapping, open_mapping


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

    def discover(self) -> int:
        if self.silent:
            raise Exception("Success")
        return 1

    def selectigd(self) -> None:
        if self.silent:
            raise Exception("No UPnP device discovered")

    def externalipaddress(self) -> str:
        return "11.0.0.1"

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

    def deleteportmapping(self, port: int, protocol: str) -> bool:
        if self.mapped.pop(port, None) is None:
            raise Exception("NoSuchEntryInArray")
        return True


def use(router: Router, monkeypatch: pytest.MonkeyPatch) -> Router:
    monkeypatch.setattr(upnp, "miniupnpc", SimpleNamespace(UPnP=lambda: router))
    return router


async def test_a_port_is_mapped_for_a_while_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    router = use(Router(), monkeypatch)
    async with open_mapping(4001) as mapping:
        assert (mapping.ip, mapping.port) == ("11.0.0.1", 4001)
        assert router.mapped == {4001: (4001, upnp.LEASE_S)}
    assert router.mapped == {}


async def test_a_taken_port_gives_way_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    router = use(Router(taken=(4001,)), monkeypatch)
    async with open_mapping(4001) as mapping:
        assert mapping.port != 4001
        assert router.mapped[mapping.port][0] == 4001


async def test_a_router_that_knows_no_leases_maps_for_good_and_is_cleaned_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = use(Router(permanent_only=True), monkeypatch)
    async with open_mapping(4001) as mapping:
        assert router.mapped == {4001: (4001, 0)}
        assert mapping.lease_s == 0
    assert router.mapped == {}


@pytest.mark.parametrize("router", [Router(silent=True), Router(taken=tuple(range(65536)))])
async def test_no_router_or_an_unwilling_one_is_no_mapping(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(router, monkeypatch)
    with pytest.raises(NoMapping, match="router"):
        async with open_mapping(4001):
            pass


async def test_a_lease_is_renewed_and_a_refusal_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    router = use(Router(), monkeypatch)
    monkeypatch.setattr(upnp, "LEASE_S", 0.02)
    with caplog.at_level(logging.WARNING, "p2pinfer"), trio.fail_after(10):
        async with open_mapping(4001):
            while router.calls < 3:
                await trio.sleep(0.005)
            router.refusing = True
            while "did not renew" not in caplog.text:
                await trio.sleep(0.005)


async def test_a_router_that_has_forgotten_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    router = use(Router(), monkeypatch)
    async with open_mapping(4001):
        router.mapped.clear()


def test_what_miniupnpc_offers_is_what_is_used() -> None:
    real: Any = pytest.importorskip("miniupnpc", reason="it has no wheel for this Python").UPnP()
    for name in ("discover", "selectigd", "externalipaddress", "addportmapping", "deleteportmapping"):
        assert callable(getattr(real, name))


async def test_without_miniupnpc_there_is_no_mapping_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upnp, "miniupnpc", None)
    with pytest.raises(NoMapping, match=r"lacks miniupnpc.*forward the port by hand"):
        async with open_mapping(4001):
            pass
