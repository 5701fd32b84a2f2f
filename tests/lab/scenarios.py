"""The scenarios that have a name."""

from __future__ import annotations

from typing import Final

from .scenario import Line, RouterKind, Scenario, Site

HOME: Final = Line(delay_ms=12, jitter_ms=2, up_mbit=40, down_mbit=100)
DATACENTRE: Final = Line(delay_ms=4, up_mbit=1000, down_mbit=1000)
MOBILE: Final = Line(delay_ms=35, jitter_ms=20, up_mbit=10, down_mbit=40, queue_ms=400, loss=0.005)

# What a host can be behind, as the table in docs/nat.md has it.
KINDS: Final[dict[str, tuple[RouterKind, ...]]] = {
    "public": (),
    "port-preserving": ("port-preserving",),
    "RST-ing": ("rst",),
    "symmetric": ("symmetric",),
    "double NAT": ("port-preserving", "port-preserving"),
    "UPnP": ("upnp",),
}
RELAYS: Final = ("relay1", "relay2")
RELAY_PORT: Final = 4001


def relay_sites() -> tuple[Site, ...]:
    """Two public hosts in data centres."""
    return tuple(Site(name, line=DATACENTRE) for name in RELAYS)


def home(name: str, kind: str, *hosts: str) -> Site:
    """A home behind what a kind of the table says, its host named as the site by default."""
    return Site(name, hosts or (name,), KINDS[kind], HOME)


def pair(one: str, other: str) -> Scenario:
    """Two homes of these kinds, `a` and `b`, a public client `c`, and two relays."""
    sites = (*relay_sites(), home("a", one), home("b", other), Site("c", line=HOME))
    return Scenario(f"pair:{one}:{other}", f"{one} and {other} find each other", sites)


def site_name(side: str, kind: str) -> str:
    """The site and host of a kind in `all-pairs`; `side` is a or b."""
    return f"{side}{list(KINDS).index(kind)}"


ALL_PAIRS: Final = Scenario(
    "all-pairs",
    "two homes of every kind, a0 to a5 and b0 to b5, a public client and two relays",
    (
        *relay_sites(),
        *(home(site_name(side, kind), kind) for side in "ab" for kind in KINDS),
        Site("c", line=HOME),
    ),
)

_NAMED: Final = (
    ALL_PAIRS,
    Scenario(
        "volunteers",
        "three nodes behind three routers and a client behind a fourth, nobody public but the relays",
        (
            *relay_sites(),
            home("n1", "port-preserving"),
            home("n2", "port-preserving"),
            home("n3", "double NAT"),
            home("me", "port-preserving"),
        ),
    ),
    Scenario(
        "homes",
        "a relay, two homes that can punch, one that cannot, and a public client",
        (
            Site("relay1", line=DATACENTRE),
            home("a", "port-preserving"),
            home("b", "port-preserving"),
            home("s", "symmetric"),
            Site("c", line=HOME),
        ),
    ),
    Scenario(
        "family",
        "two hosts in one home, which find each other without the internet, and one elsewhere",
        (*relay_sites(), home("f", "symmetric", "f1", "f2"), home("g", "port-preserving")),
    ),
    Scenario(
        "six",
        "homes that have IPv6 behind firewalls, beside IPv4 that is translated twice",
        (
            Site("relay1", line=DATACENTRE, ipv6=True),
            Site("a", ("a",), ("firewall",), HOME, ipv4=False, ipv6=True),
            Site("b", ("b",), ("firewall",), HOME, ipv4=False, ipv6=True),
        ),
    ),
    Scenario(
        "failover",
        "hops for three spans, each in a home that can punch and one that cannot, public spares, a client",
        (
            *relay_sites(),
            *(home(f"n{number}", "port-preserving") for number in (1, 2, 3)),
            *(home(f"s{number}", "symmetric") for number in (1, 2, 3, 4)),
            *(home(f"p{number}", "public") for number in (1, 2)),
            home("me", "port-preserving"),
        ),
    ),
    Scenario(
        "train",
        "a node on a mobile line that loses packets and queues for half a second",
        (
            Site("relay1", line=DATACENTRE),
            Site("a", ("a",), KINDS["port-preserving"], MOBILE),
            home("b", "port-preserving"),
        ),
    ),
)
SCENARIOS: Final = {scenario.name: scenario for scenario in _NAMED}


def named(name: str) -> Scenario:
    """The scenario of that name; `pair:KIND:KIND` is one for any two kinds.

    Raises:
        KeyError: There is none; the message lists them.
    """
    if name in SCENARIOS:
        return SCENARIOS[name]
    word, _, kinds = name.partition(":")
    one, _, other = kinds.partition(":")
    if word == "pair" and one in KINDS and other in KINDS:
        return pair(one, other)
    pairs = f"pair:A:B with A and B of {', '.join(KINDS)}"
    raise KeyError(f"no scenario {name!r}; there are {', '.join(SCENARIOS)}, and {pairs}")
