"""Discovery in the local network by multicast DNS, as libp2p's specification has it.

A host advertises a service of type `_p2p._udp.local` under a random name, with its multiaddrs as `dnsaddr=`
in the TXT record. -- libp2p specs, discovery/mdns.md. zeroconf, which comes with libp2p, does the talking, in
threads of its own; what it finds is handed over to trio.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import trio
from zeroconf import (
    InterfaceChoice,
    ServiceBrowser,
    ServiceInfo,
    ServiceStateChange,
    Zeroconf,
)

from p2pinfer.node.concurrency.shield import shielded
from p2pinfer.node.transport.addresses import is_circuit, parse_tcp, split_peer

logger = logging.getLogger(__name__)

SERVICE: Final = "_p2p._udp.local."
MAX_ADDRS: Final = 8  # of one peer's
MAX_PEERS: Final = 64  # that are told of; more is a flood
ASK_MS: Final = 2000
CLOSE_S: Final = 2.0

Found = Callable[[str, tuple[str, ...]], None]


async def keep_looking_around(
    addrs: Sequence[str], found: Found, *, interfaces: InterfaceChoice | list[str] = InterfaceChoice.Default
) -> None:
    """Advertise `addrs`, if there are any, and look for others, until cancelled.

    A network that does not let us is logged, and no error.

    Args:
        addrs: Our multiaddrs with `/p2p/<id>`.
        found: Called in trio's thread with the id and the addresses of every peer that is found, once.
        interfaces: Where, as zeroconf has it.
    """
    watch = _Watch(found, trio.lowlevel.current_trio_token())
    zeroconf: Zeroconf | None = None
    try:
        zeroconf = await trio.to_thread.run_sync(_start, list(addrs), watch, interfaces)
        await trio.sleep_forever()
    except Exception as exc:  # zeroconf's own errors and the system's: no multicast here
        logger.info("mDNS discovery does not work here: %s", exc)
    finally:
        watch.ended = True
        if zeroconf is not None:
            with shielded(CLOSE_S):
                await trio.to_thread.run_sync(zeroconf.close, abandon_on_cancel=True)


def service_of(addrs: Iterable[str]) -> ServiceInfo:
    """Service record that is advertised for a peer at `addrs`."""
    name = secrets.token_hex(16)
    usable = [address for address in addrs if not is_circuit(address)][:MAX_ADDRS]
    # A TXT record is a list of strings; all of ours begin with the same key, which a mapping cannot say.
    text = b"".join(bytes([len(line)]) + line for line in (f"dnsaddr={each}".encode() for each in usable))
    # Others need no address record, but who asks through zeroconf waits for one in vain.
    hosts = {host for protocol, host, _, _ in map(parse_tcp, usable) if protocol.startswith("ip")}
    return ServiceInfo(
        SERVICE,
        f"{name}.{SERVICE}",
        port=4001,
        properties=text,
        server=f"{name}.local.",
        parsed_addresses=sorted(hosts),
    )


def peer_of(text: bytes) -> tuple[str, tuple[str, ...]] | None:
    """The peer id and the multiaddrs in a TXT record; None if it has none that can be dialled."""
    addrs: list[str] = []
    peer_id = ""
    at = 0
    while at < len(text) and len(addrs) < MAX_ADDRS:
        line = text[at + 1 : at + 1 + text[at]]
        at += 1 + text[at]
        key, _, value = line.partition(b"=")
        if not key.startswith(b"dnsaddr"):
            continue
        try:
            address = value.decode("ascii")
            _, named = split_peer(address)
            parse_tcp(address)
        except ValueError:
            continue
        if peer_id in ("", named):
            peer_id = named
            addrs.append(address)
    return (peer_id, tuple(addrs)) if addrs else None


class _Watch:
    """Called by zeroconf's thread."""

    def __init__(self, found: Found, token: trio.lowlevel.TrioToken) -> None:
        self.ended = False
        self._found = found
        self._token = token
        self._told: set[str] = set()

    def changed(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed or self.ended:
            return
        info = ServiceInfo(service_type, name)
        info.request(zeroconf, ASK_MS)  # False where an address record is missing, which is no loss
        peer = peer_of(info.text) if info.text else None
        if peer is not None:
            try:
                self._token.run_sync_soon(self._tell, *peer)
            except trio.RunFinishedError:
                self.ended = True

    def _tell(self, peer_id: str, addrs: tuple[str, ...]) -> None:
        if not self.ended and peer_id not in self._told and len(self._told) < MAX_PEERS:
            self._told.add(peer_id)
            self._found(peer_id, addrs)


def _start(addrs: Sequence[str], watch: _Watch, interfaces: InterfaceChoice | list[str]) -> Zeroconf:
    zeroconf = Zeroconf(interfaces=interfaces)
    try:
        # First, since a second goes by until a name is known to be nobody else's.
        ServiceBrowser(zeroconf, SERVICE, handlers=[watch.changed])
        if addrs:
            zeroconf.register_service(service_of(addrs))
    except BaseException:
        zeroconf.close()
        raise
    return zeroconf
