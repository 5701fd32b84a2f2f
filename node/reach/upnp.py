"""Port mapping on the router by UPnP: requested, renewed, and given back; and the router's address, watched.

libp2p's own (0.8.1) maps without a lease, so that a crash leaves the port open for good, never renews, and
does not announce the address. miniupnpc, which comes with it, does the talking; it blocks, so it runs in
threads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, cast

import trio

from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.concurrency.pulse import Pulse
from p2pinfer.node.concurrency.shield import shielded

try:
    import miniupnpc
except ImportError:  # it has no wheel for Python 3.14, and nothing may be compiled on a user's machine
    miniupnpc = None

logger = logging.getLogger(__name__)

DISCOVER_MS: Final = 1000  # how long routers have to answer each of four questions
LEASE_S: Final = 1200  # a node that crashes leaves its port open for so long at most
FOREVER_S: Final = 0  # what routers that know no leases insist on
PORTS_TRIED: Final = 4
GOODBYE_S: Final = 3.0
LOOK_S: Final = 5.0  # between looks at the router's address, which costs it one small answer
REMAP_S: Final = 30.0  # before a port that the router does not list is asked for again


class Gateway(Protocol):
    """The part of `miniupnpc.UPnP` that is used here."""

    lanaddr: str

    def externalipaddress(self) -> str: ...
    def addportmapping(
        self, port: int, protocol: str, host: str, inside: int, why: str, remote: str, lease_s: int
    ) -> bool: ...
    def deleteportmapping(self, port: int, protocol: str) -> bool: ...
    def getspecificportmapping(self, port: int, protocol: str) -> object | None: ...


@dataclass(frozen=True, slots=True)
class Mapping:
    """A port of the router's that leads to one of ours."""

    ip: str  # the router's own, which is not the internet's if there is another router behind it
    port: int
    inside: int
    lease_s: int  # 0: until somebody removes it


class NoMapping(Exception):
    """No router maps a port, or it refuses to."""


@asynccontextmanager
async def open_mapping(
    inside: int, on_change: Callable[[Mapping], None], look_now: Pulse
) -> AsyncGenerator[Mapping]:
    """A mapping for the TCP port `inside`, renewed until the block ends and then removed.

    Args:
        inside: The port of ours that it leads to.
        on_change: Called with the mapping whenever the router has another address.
        look_now: Fired when the router may have been restarted.

    Raises:
        NoMapping: The message says why there is none.
    """
    gateway = await trio.to_thread.run_sync(discover, abandon_on_cancel=True)
    mapping = await trio.to_thread.run_sync(add, gateway, inside)
    try:
        async with open_nursery() as nursery:
            nursery.start_soon(_keep, gateway, mapping, on_change, look_now)
            yield mapping
    finally:
        with shielded(GOODBYE_S):
            await trio.to_thread.run_sync(remove, gateway, mapping, abandon_on_cancel=True)


def discover() -> Gateway:
    """The router, if it speaks UPnP. Blocks for `DISCOVER_MS`.

    Raises:
        NoMapping: There is none, or miniupnpc is not installed.
    """
    if miniupnpc is None:
        raise NoMapping(
            "this Python lacks miniupnpc, which asks routers: `pip install miniupnpc` needs a C compiler "
            "here; forward the port by hand, or use Python 3.11 to 3.13"
        )
    upnp = cast(Any, miniupnpc).UPnP()
    upnp.discoverdelay = DISCOVER_MS
    try:
        upnp.discover()
    except Exception as exc:  # miniupnpc raises bare ones, "Success" among them, whatever it has found
        logger.debug("upnp.discover why=%s", exc)
    try:
        upnp.selectigd()
    except Exception as exc:
        raise NoMapping("no router answers to UPnP") from exc
    return cast(Gateway, upnp)


def add(gateway: Gateway, inside: int) -> Mapping:
    """Map a port to `inside`: the same one if it is free, else one nearby. Blocks.

    Raises:
        NoMapping: The router refuses.
    """
    why = ""
    for port in (inside, *(1024 + (inside * 7919 + 257 * n) % 64000 for n in range(1, PORTS_TRIED))):
        for lease_s in (LEASE_S, FOREVER_S):
            try:
                _map(gateway, port, inside, lease_s)
                return Mapping(gateway.externalipaddress(), port, inside, lease_s)
            except Exception as exc:
                why = str(exc)
                if "permanent" not in why.lower():  # OnlyPermanentLeasesSupported: try without a lease
                    break
    raise NoMapping(f"the router refuses to map a port ({why})")


def remove(gateway: Gateway, mapping: Mapping) -> None:
    """Give the port back; quiet if the router does not answer. Blocks."""
    try:
        gateway.deleteportmapping(mapping.port, "TCP")
    except Exception as exc:
        logger.debug("upnp.remove_failed port=%d why=%s", mapping.port, exc)


async def _keep(
    gateway: Gateway, mapping: Mapping, on_change: Callable[[Mapping], None], look_now: Pulse
) -> None:
    """Renew the mapping in time, make it anew when the router has forgotten it, and watch its address."""
    renewed_at, is_told = trio.current_time(), False
    while True:
        with trio.move_on_after(min(LOOK_S, mapping.lease_s / 2 or LOOK_S)):
            await look_now.wait()
        try:
            ip, is_kept = await trio.to_thread.run_sync(_look, gateway, mapping)
            due_at = renewed_at + (REMAP_S if not is_kept else mapping.lease_s / 2 or math.inf)
            if ip != mapping.ip or trio.current_time() >= due_at:
                await trio.to_thread.run_sync(_map, gateway, mapping.port, mapping.inside, mapping.lease_s)
                renewed_at = trio.current_time()
            is_told = False
        except Exception as exc:
            # A router that restarts is silent for a minute, and may come back with another port for
            # questions.
            if not is_told:
                logger.warning("the router did not renew port %d: %s; trying again", mapping.port, exc)
            is_told = True
            with suppress(NoMapping):
                gateway = await trio.to_thread.run_sync(discover, abandon_on_cancel=True)
            continue
        if ip != mapping.ip:
            mapping = replace(mapping, ip=ip)
            on_change(mapping)


def _look(gateway: Gateway, mapping: Mapping) -> tuple[str, bool]:
    """The router's address, and if it still maps our port. Blocks."""
    return gateway.externalipaddress(), gateway.getspecificportmapping(mapping.port, "TCP") is not None


def _map(gateway: Gateway, port: int, inside: int, lease_s: int) -> None:
    if not gateway.addportmapping(port, "TCP", gateway.lanaddr, inside, "p2pinfer", "", lease_s):
        raise NoMapping("it says no")
