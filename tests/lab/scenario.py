"""What a scenario is made of: sites on the internet, their lines, their routers, their hosts.

A site is whatever one subscriber has: a public host, or routers with hosts behind them. Everything here is
data; plan.py turns it into commands, wan.py carries the packets between the sites.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RouterKind = Literal["port-preserving", "rst", "symmetric", "upnp", "firewall"]
# port-preserving  translates addresses and keeps the source port; drops what nobody inside asked for
# rst              the same, but answers unsolicited SYNs with RST
# symmetric        takes another random port for every flow
# upnp             port-preserving, and maps ports for whoever asks by UPnP
# firewall         does not translate; lets in only what was asked for (how homes have IPv6)

HOME_NET = "192.168.1"  # of every home, as in life: the address of a host here is also one over there
CARRIER_NET = "100.64.0"  # between a carrier's router and the subscriber's (RFC 6598)


@dataclass(frozen=True, slots=True)
class Line:
    """What lies between a site and the core of the internet; two lines make a path."""

    delay_ms: float = 10.0  # one way
    jitter_ms: float = 0.0  # added, evenly spread from 0 to this; packets stay in order
    up_mbit: float = 100.0  # from the site
    down_mbit: float = 100.0  # to the site
    queue_ms: float = 100.0  # what may wait for either direction, in time at full rate; the rest is dropped
    loss: float = 0.0  # share of packets lost, in either direction; 1.0 is a cut

    def __post_init__(self) -> None:
        if min(self.delay_ms, self.jitter_ms, self.queue_ms) < 0 or min(self.up_mbit, self.down_mbit) <= 0:
            raise ValueError(f"a line cannot be like this: {self}")
        if not 0 <= self.loss <= 1:
            raise ValueError(f"loss is {self.loss:g}; it is a share, 0 to 1")


@dataclass(frozen=True, slots=True)
class Site:
    """A public host, or a home: hosts behind one router or more."""

    name: str  # at most 10 characters, since interfaces are named after it
    hosts: tuple[str, ...] = ()  # default: one, named as the site
    routers: tuple[RouterKind, ...] = ()  # from the internet inwards; none: the only host is public
    line: Line = Line()
    ipv4: bool = True
    ipv6: bool = False

    def __post_init__(self) -> None:
        if not self.hosts:
            object.__setattr__(self, "hosts", (self.name,))
        if not self.routers and len(self.hosts) != 1:
            raise ValueError(f"site {self.name} has no router, and so exactly one host")
        if self.ipv6 and len(self.routers) > 1:
            raise ValueError(f"site {self.name}: carriers that translate IPv4 hand out IPv6 themselves")
        if not 0 < len(self.name) <= 10:
            raise ValueError(f"site {self.name!r}: a name has 1 to 10 characters")

    @property
    def router_names(self) -> tuple[str, ...]:
        """The routers' namespaces, from the internet inwards."""
        if len(self.routers) < 2:
            return (f"{self.name}-router",) * len(self.routers)
        carriers = (f"{self.name}-carrier{n}" for n in range(1, len(self.routers)))
        return (*carriers, f"{self.name}-router")

    @property
    def edge(self) -> str:
        """The namespace that the line ends in."""
        return self.router_names[0] if self.routers else self.hosts[0]


@dataclass(frozen=True, slots=True)
class Scenario:
    """An internet: sites, and the core between them, which adds nothing of its own."""

    name: str
    says: str  # what it is good for, in a line
    sites: tuple[Site, ...]

    def __post_init__(self) -> None:
        names = [name for site in self.sites for name in (*site.router_names, *site.hosts)]
        if len(set(names)) != len(names) or len({site.name for site in self.sites}) != len(self.sites):
            raise ValueError(f"scenario {self.name}: two things have one name")
        if len(self.sites) > 200:
            raise ValueError(f"scenario {self.name}: there are addresses for 200 sites")

    @property
    def hosts(self) -> tuple[str, ...]:
        """All hosts, site by site."""
        return tuple(host for site in self.sites for host in site.hosts)

    def site(self, name: str) -> Site:
        """The site of that name, or the one in which the host or router of that name is.

        Raises:
            KeyError: There is none.
        """
        for site in self.sites:
            if name in (site.name, *site.hosts, *site.router_names):
                return site
        raise KeyError(f"{name} is not in scenario {self.name}; its hosts: {', '.join(self.hosts)}")

    def public_ipv4(self, name: str) -> str:
        """The address by which the internet sees a host, a router or a site."""
        return f"{self._net4(self.site(name))}.1"

    def public_ipv6(self, name: str) -> str:
        """A host's own IPv6 address; nothing translates it."""
        site = self.site(name)
        inside = f"1::{10 + site.hosts.index(name):x}" if site.routers and name in site.hosts else ":1"
        return f"{self.net6(site)}:{inside}"

    def own_ipv4(self, host: str) -> str:
        """The address that a host has on its own interface."""
        site = self.site(host)
        return f"{HOME_NET}.{10 + site.hosts.index(host)}" if site.routers else self.public_ipv4(host)

    def net6(self, site: Site) -> str:
        """The first 48 bits of a site's IPv6 addresses. Nobody has 2abc::/16, and it counts as global."""
        return f"2abc:0:{1 + self.sites.index(site):x}"

    def _net4(self, site: Site) -> str:
        # Documentation addresses would not do: they count as private. 11/8 is nowhere on the internet.
        return f"11.0.{1 + self.sites.index(site)}"

    def prefixes(self, site: Site) -> tuple[bytes, ...]:
        """What the addresses of a site begin with: 3 bytes of IPv4, 6 bytes of IPv6."""
        number = 1 + self.sites.index(site)
        return bytes((11, 0, number)), bytes((0x2A, 0xBC, 0, 0, 0, number))
