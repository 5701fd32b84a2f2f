"""Multiaddrs: which can be listened on, which can be dialled, and which are ours."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache

import psutil
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as NoMultiaddr

from p2pinfer.errors import AddressUnusable, ConfigError

from .identity import is_peer_id

_TCP = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/\s]+)/tcp/(\d{1,5})(?:/p2p/([^/\s]+))?/?\Z", re.ASCII)
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?", re.ASCII)
CIRCUIT = "/p2p-circuit"
_RELAY = re.compile(r"/p2p/([^/]+)/p2p-circuit")
_KEY_AS_CID = re.compile(r"(?<=/p2p/)[a-z][a-zA-Z0-9]{40,80}(?=/|\Z)", re.ASCII)


def parse_tcp(address: str) -> tuple[str, str, int, str]:
    """(protocol, host, port, peer id or "") of `/ip4/<ip>/tcp/<port>[/p2p/<id>]`, also ip6 and dns.

    Raises:
        ValueError: It is anything else.
    """
    match = _TCP.match(address)
    if match is None:
        raise ValueError(f"{address!r} is not of the form /ip4/<ip>/tcp/<port>")
    protocol, host, port, peer_id = match.groups()
    if protocol == "ip4":
        ipaddress.IPv4Address(host)
    elif protocol == "ip6":
        ipaddress.IPv6Address(host)
    if int(port) > 65535:
        raise ValueError(f"{address!r} has a port above 65535")
    if peer_id and not is_peer_id(peer_id):
        raise ValueError(f"{address!r} does not end in the id of a peer with an Ed25519 key")
    return protocol, host, int(port), peer_id or ""


def with_plain_ids(address: str) -> str:
    """`address` with its peer ids in base58, in which all peers write them.

    People may have them as CIDs as well, of the codec `libp2p-key`: libp2p/specs, peer-ids/peer-ids.md, has
    implementations read both. What is no such CID stays as it is.
    """
    return _KEY_AS_CID.sub(_plain_id, address)


def _plain_id(named: re.Match[str]) -> str:
    with suppress(NoMultiaddr):  # it is the CID of something else, or none
        return str(Multiaddr(f"/p2p/{named[0]}")).removeprefix("/p2p/")
    return named[0]


def parse_circuit(address: str) -> tuple[str, str, str]:
    """(the relay's address with `/p2p/<relay>`, the relay's id, peer id or "") of a way through a relay.

    It is written `/ip4/<ip>/tcp/<port>/p2p/<relay>/p2p-circuit[/p2p/<peer>]`.

    Raises:
        ValueError: It is anything else.
    """
    relay, circuit, rest = address.partition(CIRCUIT)
    named = rest.removeprefix("/p2p/").removesuffix("/")
    if not circuit or (rest not in ("", "/") and not (rest.startswith("/p2p/") and is_peer_id(named))):
        raise ValueError(f"{address!r} is not of the form /ip4/<ip>/tcp/<port>/p2p/<relay>/p2p-circuit")
    _, relay_id = split_peer(relay)
    return relay, relay_id, named if rest not in ("", "/") else ""


def is_circuit(address: str) -> bool:
    """True if `address` leads through a relay."""
    return CIRCUIT in address


def relays_of(addresses: Iterable[str]) -> set[str]:
    """The ids of the relays that some of `addresses` lead through."""
    return {found[1] for each in addresses if (found := _RELAY.search(each))}


def split_peer(address: str) -> tuple[str, str]:
    """`address` without `/p2p/<id>` of whom it leads to, and the id.

    Raises:
        ValueError: It cannot be dialled, or names no peer.
    """
    if is_circuit(address):
        relay, _, peer_id = parse_circuit(address)
        if not peer_id:
            raise ValueError(f"{address!r} does not end in /p2p/<peer id>")
        return relay + CIRCUIT, peer_id
    protocol, host, port, peer_id = parse_tcp(address)
    if not peer_id:
        raise ValueError(f"{address!r} does not end in /p2p/<peer id>")
    return f"/{protocol}/{host}/tcp/{port}", peer_id


@lru_cache(maxsize=4096)  # 20 us a time otherwise
def line_of(ip: str) -> str:
    """The addresses that one line may have: an IPv4 address, or the /56 of an IPv6 address.

    A provider gives an IPv6 customer a /56, /60 or /64, and each device picks its addresses there.
    """
    return _network(ip, 32, 56)


@lru_cache(maxsize=4096)
def range_of(ip: str) -> str:
    """The addresses that one customer may have at most: the /24 of an IPv4 address, the /48 of IPv6."""
    return _network(ip, 24, 48)


def range_of_connection(remote: tuple[str, int] | None, addresses: Sequence[object]) -> str:
    """The address range that a connection counts for: the peer's, or the relay that carries it.

    Args:
        remote: IP address and port of the peer; None through a relay.
        addresses: Multiaddrs of the connection, of which a relayed one's names the relay.
    """
    if remote is not None:
        return range_of(remote[0])
    relay = next((found[1] for each in addresses if (found := _RELAY.search(str(each)))), "")
    return f"relay {relay}"


def _network(ip: str, ipv4_bits: int, ipv6_bits: int) -> str:
    try:
        address = ipaddress.ip_address(ip.partition("%")[0])
    except ValueError:  # a pair of Unix sockets, or a test's
        return ip
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    bits = ipv4_bits if address.version == 4 else ipv6_bits
    return str(ipaddress.ip_network(f"{address}/{bits}", strict=False))


def check_listen(addresses: Sequence[str]) -> None:
    """Make sure that every one of `addresses` can be listened on, before anything else is started.

    libp2p binds with SO_REUSEPORT, which lets two processes of a user share a port without noticing.

    Raises:
        AddressUnusable: One is malformed, taken, or not of this machine.
    """
    for address in addresses:
        try:
            protocol, host, port, peer_id = parse_tcp(address)
        except ValueError as exc:
            raise AddressUnusable(f"cannot listen: {exc}") from exc
        if protocol not in ("ip4", "ip6") or peer_id:
            raise AddressUnusable(f"cannot listen on {address}: give /ip4/<ip>/tcp/<port>")
        family = socket.AF_INET if protocol == "ip4" else socket.AF_INET6
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
                probe.listen(1)
        except OSError as exc:
            raise AddressUnusable(f"cannot listen on {address}: {_why(exc)}") from exc


def check_announced(addresses: Sequence[str], peer_id: str) -> tuple[str, ...]:
    """Addresses that others are to be told of, as they are written elsewhere: without our own id.

    Raises:
        ConfigError: One of them can be dialled by nobody, or leads to somebody else.
    """
    checked: list[str] = []
    for address in addresses:
        try:
            protocol, host, port, named = parse_tcp(address)
            _check_host(protocol, host)
        except ValueError as exc:
            raise ConfigError(
                f"--announce: {exc}; write for example /ip4/203.0.113.7/tcp/4001, or "
                "/dns4/example.org/tcp/4001"
            ) from exc
        if port == 0:
            raise ConfigError(f"--announce {address}: nobody can dial port 0; name the port that leads here")
        if named and named != peer_id:
            raise ConfigError(f"--announce {address}: that is another peer's id; this one is {peer_id}")
        checked.append(f"/{protocol}/{host}/tcp/{port}")
    return tuple(dict.fromkeys(checked))


def _check_host(protocol: str, host: str) -> None:
    """Raises ValueError for what no peer can dial."""
    if protocol in ("ip4", "ip6"):
        ip = ipaddress.ip_address(host)
        if ip.is_unspecified or ip.is_multicast or host == "255.255.255.255":
            raise ValueError(f"{host} is not an address that peers can dial")
    elif len(host) > 253 or not all(_LABEL.fullmatch(label) for label in host.rstrip(".").split(".")):
        raise ValueError(f"{host!r} is not a host name")


def _why(exc: OSError) -> str:
    match exc.errno:
        case errno.EADDRINUSE:
            return "the port is taken; choose another, or 0 for any that is free"
        case errno.EADDRNOTAVAIL:
            return "this machine does not have that address"
        case errno.EACCES:
            return "ports below 1024 need special rights"
        case _:
            return exc.strerror or str(exc)


def advertised(listening: Iterable[str]) -> list[str]:
    """Addresses to tell others for those in `listening`: wildcards become this machine's addresses."""
    result: list[str] = []
    lonely: list[str] = []  # what a wildcard means on a machine without a network
    for address in listening:
        protocol, host, port, _ = parse_tcp(address)
        wildcard = ipaddress.ip_address(host).is_unspecified
        for each in machine_addresses(protocol) if wildcard else [host]:
            only_here = wildcard and ipaddress.ip_address(each).is_loopback
            (lonely if only_here else result).append(f"/{protocol}/{each}/tcp/{port}")
    return list(dict.fromkeys(result or lonely))


def without_missing_ipv6(addresses: Sequence[str]) -> list[str]:
    """`addresses` less the IPv6 wildcard, if this system has no IPv6 and there are others."""
    if _has_ipv6() or len(addresses) < 2:
        return list(addresses)
    return [address for address in addresses if not address.startswith("/ip6/::/")]


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def machine_addresses(protocol: str) -> list[str]:
    """This machine's addresses, the one that leads out first; loopback only if there is no other."""
    family = socket.AF_INET if protocol == "ip4" else socket.AF_INET6
    states = psutil.net_if_stats()
    found = [
        ipaddress.ip_address(each.address)
        for name, addresses in psutil.net_if_addrs().items()
        if name not in states or states[name].isup
        for each in addresses
        if each.family == family and "%" not in each.address
    ]
    usable = [ip for ip in found if not (ip.is_loopback or ip.is_link_local or ip.is_unspecified)]
    if not usable:
        return ["127.0.0.1" if protocol == "ip4" else "::1"]
    outward = _outward_address(family)
    return [str(ip) for ip in sorted(usable, key=lambda ip: (str(ip) != outward, ip.is_private))]


def _outward_address(family: socket.AddressFamily) -> str:
    """The address this machine would send from to the rest of the world; "" if it has no way there."""
    target = "192.0.2.1" if family == socket.AF_INET else "2001:db8::1"  # documentation prefixes
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))  # sends nothing, only picks a route
            return str(probe.getsockname()[0])
    except OSError:
        return ""
