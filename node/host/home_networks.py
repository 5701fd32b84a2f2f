"""Networks that this host lives in: addresses of no other network than these are dialled on hearsay.

`10.0.0.7` is another machine in every house. Who has a node of ours dial it, on no more than its word, has it
knock at a door inside our operator's network that the internet cannot reach. Among peers of one network such
an address is how they meet, so what counts is if this host is in that network itself.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import psutil
import trio

from p2pinfer.node.transport.addresses import machine_addresses
from p2pinfer.recent import Recent

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

LOOK_AGAIN_S: Final = 10.0  # a laptop may have moved
MAX_MET: Final = 64  # networks that peers came from
_SITES: Final = tuple(
    map(
        ipaddress.ip_network,
        ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "198.18.0.0/15", "fc00::/7"),
    )
)
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")  # the IPv4 address is in its last four bytes


class HomeNetworks:
    """The networks of this host's interfaces, as they are at the moment."""

    def __init__(
        self,
        look: Callable[[], Sequence[Network]] | None = None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self.has_loopback = False  # peers of this machine are met over loopback
        self._look = look or attached_networks
        self._clock = clock
        self._sites: set[Network] = set()
        self._met = Recent[Network, None](MAX_MET)
        self._networks: Sequence[Network] = ()
        self._looked_at = float("-inf")

    def note_site(self, ip: str) -> None:
        """Our swarm is at this address by our operator's word: where it leads, this host has a part in.

        A container is in a network of its own, and reaches its machine's through a router.
        """
        address = plain(ip)
        if address is not None and address.is_loopback:
            self.has_loopback = True
        self._sites.update(site for site in _SITES if address is not None and address in site)

    def note_met(self, ip: str) -> None:
        """A peer came from this address, or was found there."""
        address = plain(ip)
        if address is None or address.is_global:
            return
        if address.is_loopback:
            self.has_loopback = True
        else:
            bits = 24 if address.version == 4 else 64
            self._met[ipaddress.ip_network(f"{address}/{bits}", strict=False)] = None

    def has(self, ip: str) -> bool:
        """True if `ip` is the same machine for everybody, or one of a network that this host is in."""
        address = plain(ip)
        if address is None or address.is_multicast or address.is_unspecified or address.is_link_local:
            return False
        if address.is_loopback:
            return self.has_loopback
        if address.is_global:
            return True
        if self._clock() >= self._looked_at + LOOK_AGAIN_S:
            self._networks, self._looked_at = self._look(), self._clock()
        return any(address in network for network in (*self._networks, *self._sites, *self._met))


def plain(ip: str) -> Address | None:
    """The address that packets to `ip` go to; None if it is none. IPv6 can be another spelling of IPv4."""
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address in _NAT64:
            return ipaddress.IPv4Address(address.packed[-4:])
    return address


def is_loopback(host: str) -> bool:
    """True if `host`, an IP address or a name, is this machine only."""
    address = plain(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


async def resolve(protocol: str, host: str, port: int) -> str:
    """The IP address of the `host` of a multiaddr: itself, or the first that a name has.

    Raises:
        OSError: There is no such name, or it has no address of that family.
    """
    if protocol in ("ip4", "ip6"):
        return host
    family = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}.get(protocol, socket.AF_UNSPEC)
    found = await trio.socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
    return str(found[0][4][0])


def attached_networks() -> list[Network]:
    """Networks of the interfaces; of a host without a public address, also the site that its own is in.

    A company routes between the many parts of 10.0.0.0/8. A public server has containers there at most.
    """
    found: list[Network] = []
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            if each.family in (socket.AF_INET, socket.AF_INET6) and each.netmask and "%" not in each.address:
                found.append(_network(each.address, each.netmask))
    own = [ipaddress.ip_address(each) for family in ("ip4", "ip6") for each in machine_addresses(family)]
    if not any(address.is_global for address in own):
        found += [site for site in _SITES if any(address in site for address in own[:1])]
    return found


def _network(address: str, netmask: str) -> Network:
    mask = int(ipaddress.ip_address(netmask))
    return ipaddress.ip_network(f"{address}/{mask.bit_count()}", strict=False)
