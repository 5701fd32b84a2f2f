"""Address ranges: what has a price about a peer, whose identity has none.

An IPv4 /24 is one range. Of IPv6 a customer is given a /64, a /56 or a /48, so that a /48 is one range; and
somebody who is given a /32, as providers are, has 65,536 of those. So an IPv6 address is also in its
allocation, the /32. Newcomers of one allocation take turns, and the second banned peer in it spoils all of it
(reputation/spoilt_ranges.py).

A name is no range: whoever has a domain has as many names as it likes. What counts is what it resolves to.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

NO_RANGE: Final = "none"
_LOCAL = tuple(
    map(
        ipaddress.ip_network,
        (
            *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"),
            *("127.0.0.0/8", "169.254.0.0/16", "fc00::/7", "fe80::/10", "::/48", "64:ff9b:1::/48"),
        ),
    )
)
_CUSTOMER: Final = {4: 24, 6: 48}
_ALLOCATION: Final = 32  # of IPv6
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052, 2.1: the well-known prefix
_REMEMBERED: Final = 8192
_FIRST_PARTS = re.compile(r"\A/(ip4|ip6|dns|dns4|dns6|dnsaddr)/([^/]+)")


@lru_cache(_REMEMBERED)  # a route asks for those of every newcomer
def address_range(address: str) -> str:
    """Range that a multiaddr belongs to: `/ip4/192.0.2.77/tcp/4001` is one of 192.0.2.0/24.

    It is the first address in it that counts, which of a relayed one is the relay's. A name has none.
    """
    parts = _FIRST_PARTS.match(address)
    return NO_RANGE if parts is None or parts[1].startswith("dns") else ip_range(parts[2])


def ip_range(ip: str) -> str:
    """Range of an IP address, which may be one customer's."""
    found = _network_of(ip)
    return NO_RANGE if found is None else str(found)


def ranges_of_ip(ip: str) -> frozenset[str]:
    """Ranges by which a peer that was found at an IP address can be told again; none of a local one."""
    found = _network_of(ip)
    if found is None or is_everywhere(str(found)):
        return frozenset()
    return frozenset({str(found), allocation_of(str(found))})


def ranges_of(addresses: Iterable[str]) -> frozenset[str]:
    """The same of all multiaddrs that are a peer's own: not its relay's."""
    own = (_FIRST_PARTS.match(address) for address in addresses if "/p2p-circuit" not in address)
    ips = (parts[2] for parts in own if parts is not None and not parts[1].startswith("dns"))
    return frozenset(each for ip in ips for each in ranges_of_ip(ip))


def crowded_range(addresses: Iterable[str]) -> str:
    """Range of a peer's first address that is in one network only; empty if none is."""
    return next((each for each in map(address_range, addresses) if not is_everywhere(each)), "")


def name_in(address: str) -> str:
    """Name that a peer's own multiaddr begins with; empty if it has none, or leads through a relay."""
    parts = _FIRST_PARTS.match(address)
    is_name = parts is not None and parts[1].startswith("dns") and "/p2p-circuit" not in address
    return parts[2].lower() if parts is not None and is_name else ""


@lru_cache(_REMEMBERED)
def allocation_of(name: str) -> str:
    """Range that a range was allocated from: its /32 of an IPv6 one; else the range itself."""
    if ":" not in name:
        return name
    return str(ipaddress.IPv6Network(name).supernet(new_prefix=_ALLOCATION))


def is_allocation(name: str) -> bool:
    """True if many customers' ranges may be in this one."""
    return ":" in name and name.endswith(f"/{_ALLOCATION}")


@lru_cache(_REMEMBERED)
def is_everywhere(name: str) -> bool:
    """True if the range is in many networks: every second home is 192.168.1.0/24."""
    if name == NO_RANGE:
        return True
    network = ipaddress.ip_network(name)
    return any(network.version == local.version and network.overlaps(local) for local in _LOCAL)


def _network_of(ip: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        address = ipaddress.ip_address(ip.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or _tunnelled(address) or address
    return ipaddress.ip_network(f"{address}/{_CUSTOMER[address.version]}", strict=False)


def _tunnelled(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """IPv4 address that a 6to4, Teredo or NAT64 address is made of: whoever has that one has the other.

    In a network without IPv4 all IPv4 peers have an address of the last kind.
    """
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.sixtofour or (address.teredo[1] if address.teredo else None)
