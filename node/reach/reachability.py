"""Classification of this host's NAT, from what peers observed of it.

A peer that we are connected to says from which address we come, and tries to connect to us there by itself
(`node/reach/dialback.py`). Whether it can says if we are reachable; whether the port it sees is the one we
sent from says what kind of router is in between. Nothing that only the local network has seen counts.

libp2p's AutoNAT asks the same question and gets it wrong both ways: a host that listens on a wildcard offers
that wildcard to be dialled and passes for private, and one that announces its router's address is tried over
the connection there is and passes for public.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from p2pinfer.node.transport.addresses import parse_tcp

Kind: TypeAlias = Literal["public", "mapped", "private", "unknown"]
Nat: TypeAlias = Literal["none", "firewall", "port-preserving", "symmetric", "unknown"]


@dataclass(frozen=True, slots=True)
class Observation:
    """Report of one peer on what it has seen of us."""

    peer_id: str
    seen_ip: str
    seen_port: int
    local_port: int | None  # we sent from this one; None: the peer made the connection
    reached: tuple[int, ...] = ()  # ports at `seen_ip` where it found us


@dataclass(frozen=True, slots=True)
class Reachability:
    """Type of our NAT and our outside addresses, as far as is known.

    Attributes:
        kind: As in an announcement. `unknown` until somebody outside the local network has looked.
        nat: What is in between: nothing, a firewall that lets only answers in, or a kind of router.
        outside_ips: Our addresses as seen from outside, IPv4 first.
        addrs: Multiaddrs at which we were reached from outside, without a peer id.
        observers: Peers outside the local network that have looked.
        promised: The kind is our operator's word, which nobody has confirmed or could.
    """

    kind: Kind = "unknown"
    nat: Nat = "unknown"
    outside_ips: tuple[str, ...] = ()
    addrs: tuple[str, ...] = ()
    observers: tuple[str, ...] = ()
    promised: bool = False

    @property
    def essence(self) -> tuple[object, ...]:
        """The part of it that peers are told, or that they meet us by."""
        return self.kind, self.nat, self.addrs, frozenset(self.outside_ips)


def classify(observations: Iterable[Observation], own_ips: Collection[str]) -> Reachability:
    """NAT type by the majority of the observations: a single peer may err, or lie.

    IPv4 decides the kind as long as somebody has looked there, because not everybody has IPv6.

    Args:
        own_ips: The addresses of this machine's interfaces.
    """
    outside = [each for each in observations if is_global(each.seen_ip)]
    families = [[each for each in outside if (":" in each.seen_ip) == six] for six in (False, True)]
    known = [_classify_family(family, own_ips) for family in families if family]
    if not known:
        return Reachability()
    first = known[0]
    return Reachability(
        first.kind,
        first.nat,
        tuple(ip for each in known for ip in each.outside_ips),
        tuple(address for each in known for address in each.addrs),
        tuple(dict.fromkeys(each.peer_id for each in outside)),
    )


def with_announced(seen: Reachability, announced: Sequence[str]) -> Reachability:
    """Reachability, given also the addresses that our operator announces.

    Observers try the announced ports where they see us. Where an announced address is another one than that,
    or a name, they cannot tell, and our operator's word counts.
    """
    addrs = [address for address in announced if _leads_outside(address)]
    if not addrs or seen.kind in ("public", "mapped") or is_refuted(seen, announced):
        return seen
    return replace(seen, kind="mapped", addrs=tuple(addrs), promised=True)


def is_refuted(seen: Reachability, announced: Sequence[str]) -> bool:
    """True if peers have looked at an announced address and not found us."""
    hosts = {parse_tcp(address)[1] for address in announced}
    return seen.kind == "private" and not hosts.isdisjoint(seen.outside_ips)


def _leads_outside(address: str) -> bool:
    protocol, host, _, _ = parse_tcp(address)
    return is_global(host) if protocol in ("ip4", "ip6") else True


def _classify_family(observations: Sequence[Observation], own_ips: Collection[str]) -> Reachability:
    ips = tuple(dict.fromkeys(each.seen_ip for each in observations))
    straight = all(ip in own_ips for ip in ips)
    reached = [each for each in observations if each.reached]
    addrs = tuple(dict.fromkeys(_tcp(each.seen_ip, port) for each in reached for port in each.reached))
    # More than half of those who looked. If one were enough, a single liar could have us announce an address
    # that nobody reaches; if all were needed, it could drive us behind relays.
    if len(reached) * 2 > len(observations):
        return Reachability("public" if straight else "mapped", _nat(observations, straight), ips, addrs)
    nat = "firewall" if straight else _nat(observations, straight)
    return Reachability("private", nat, ips)


def _nat(observations: Sequence[Observation], straight: bool) -> Nat:
    if straight:
        return "none"
    sent = [each for each in observations if each.local_port is not None]
    if not sent:
        return "unknown"
    return "port-preserving" if all(each.seen_port == each.local_port for each in sent) else "symmetric"


def is_global(ip: str) -> bool:
    """True if `ip` means the same machine everywhere on the internet."""
    try:
        return ipaddress.ip_address(ip).is_global
    except ValueError:
        return False


def _tcp(ip: str, port: int) -> str:
    return f"/{'ip6' if ':' in ip else 'ip4'}/{ip}/tcp/{port}"


def describe(reachability: Reachability) -> str:
    """One line for whoever runs a node."""
    match reachability.kind, reachability.nat:
        case "public", _:
            return f"reachable from the internet at {reachability.addrs[0]}"
        case "mapped", _ if reachability.promised:
            return f"announced at {reachability.addrs[0]}, which no peer outside has confirmed"
        case "mapped", _:
            return f"reachable from the internet at {reachability.addrs[0]}, a port of the router's"
        case "private", "firewall":
            behind, way = "a firewall that lets only answers in", "hole punching"
        case "private", "port-preserving":
            behind, way = "a router that keeps ports", "hole punching"
        case "private", "symmetric":
            behind, way = "a router that changes ports (symmetric)", "relays"
        case "private", _:
            behind, way = "a router", "relays"
        case _:
            return "not seen from outside the local network yet"
    return f"behind {behind}, outside {', '.join(reachability.outside_ips)}: peers reach this node by {way}"


def global_addrs(addrs: Sequence[str]) -> tuple[str, ...]:
    """Announced addresses of a peer that mean something to everybody, without the peer's id."""
    found: list[str] = []
    for address in addrs:
        try:
            protocol, host, port, _ = parse_tcp(address)
        except ValueError:  # through a relay, or nonsense
            continue
        if protocol in ("ip4", "ip6") and is_global(host):
            found.append(f"/{protocol}/{host}/tcp/{port}")
    return tuple(found)


def tcp_address(address: tuple[str, int]) -> str:
    """Multiaddr of an IP address and a port."""
    ip, port = address
    return f"/{'ip6' if ':' in ip else 'ip4'}/{ip}/tcp/{port}"
