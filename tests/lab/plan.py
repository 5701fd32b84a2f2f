"""The commands that build a scenario out of namespaces, veth pairs, bridges and iptables.

    site with routers:   wan0 [carrier1] lan0 -- wan0 [router] lan0 = bridge -- eth0 [host] ...
    public site:         wan0 [host]

Every `wan0` at an edge is a TUN device that wan.py reads; it is made there and moved here.
"""

from __future__ import annotations

from itertools import pairwise

from .scenario import CARRIER_NET, HOME_NET, RouterKind, Scenario, Site

ESTABLISHED = "-m conntrack --ctstate ESTABLISHED,RELATED"
MTU = 1500


def namespaces(scenario: Scenario) -> list[str]:
    """The commands that make every namespace."""
    names = [name for site in scenario.sites for name in (*site.router_names, *site.hosts)]
    # What homes have is the default of their systems, whatever this machine has chosen; where its kernel does
    # not allow that, TCP is as it is here.
    cubic = "sysctl -qw net.ipv4.tcp_congestion_control=cubic 2>/dev/null || true"
    return [
        f"ip netns add {name} && ip -n {name} link set lo up && ip netns exec {name} {cubic}"
        for name in names
    ]


def wiring(scenario: Scenario) -> list[str]:
    """The commands that connect, number and translate. The TUN devices, named as the sites, must exist."""
    return [command for site in scenario.sites for command in _site(scenario, site)]


def line_up(scenario: Scenario, site: Site) -> list[str]:
    """The commands that bring up the edge's end of the line, with its addresses and routes."""
    ip = f"ip -n {site.edge}"
    commands = [f"{ip} link set wan0 mtu {MTU} up"]
    if site.ipv4:
        commands += [
            f"{ip} address replace {scenario.public_ipv4(site.name)}/32 dev wan0",
            f"{ip} route replace default dev wan0",
        ]
    if site.ipv6:
        # The home's own prefix is routed on to lan0; what is left of the site's is nowhere.
        commands += [
            f"{ip} address replace {scenario.net6(site)}::1/128 dev wan0 nodad",
            f"{ip} -6 route replace default dev wan0",
        ]
    return commands


def _site(scenario: Scenario, site: Site) -> list[str]:
    commands = [f"ip link set dev {site.name} netns {site.edge} name wan0", *line_up(scenario, site)]
    names = site.router_names
    for outer, inner in pairwise(names):
        commands += _carrier(outer, inner)
    if names:
        commands += _home(scenario, site)
    for name, kind in zip(names, site.routers, strict=True):
        commands += _rules(name, kind)
    return commands


def _carrier(outer: str, inner: str) -> list[str]:
    return [
        f"ip link add lan0 netns {outer} type veth peer name wan0 netns {inner}",
        f"ip -n {outer} address add {CARRIER_NET}.1/24 dev lan0",
        f"ip -n {outer} link set lan0 up",
        f"ip -n {inner} address add {CARRIER_NET}.2/24 dev wan0",
        f"ip -n {inner} link set wan0 up",
        f"ip -n {inner} route add default via {CARRIER_NET}.1",
    ]


def _home(scenario: Scenario, site: Site) -> list[str]:
    router = site.router_names[-1]
    ip = f"ip -n {router}"
    # Snooping would drop multicast that nobody has joined yet, and with it mDNS and UPnP's discovery.
    commands = [f"{ip} link add lan0 type bridge mcast_snooping 0 forward_delay 0", f"{ip} link set lan0 up"]
    if site.ipv4:
        commands.append(f"{ip} address add {HOME_NET}.1/24 dev lan0")
    if site.ipv6:
        commands.append(f"{ip} address add {scenario.net6(site)}:1::1/64 dev lan0 nodad")
    for index, host in enumerate(site.hosts):
        commands += [
            f"ip link add port{index} netns {router} type veth peer name eth0 netns {host}",
            f"{ip} link set port{index} master lan0 up",
            f"ip -n {host} link set eth0 up",
        ]
        if site.ipv4:
            commands += [
                f"ip -n {host} address add {scenario.own_ipv4(host)}/24 dev eth0",
                f"ip -n {host} route add default via {HOME_NET}.1",
            ]
        if site.ipv6:
            commands += [
                f"ip -n {host} address add {scenario.public_ipv6(host)}/64 dev eth0 nodad",
                f"ip -n {host} -6 route add default via {scenario.net6(site)}:1::1",
            ]
    return commands


def _rules(router: str, kind: RouterKind) -> list[str]:
    inside = f"ip netns exec {router}"
    commands = [f"{inside} sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1"]
    for program in ("iptables", "ip6tables"):
        tables = f"{inside} {program} -w"
        commands += [
            f"{tables} -A FORWARD -i lan0 -o wan0 -j ACCEPT",
            f"{tables} -A FORWARD -i wan0 {ESTABLISHED} -j ACCEPT",
            f"{tables} -A INPUT -i wan0 {ESTABLISHED} -j ACCEPT",
        ]
        if kind == "upnp":  # whatever the daemon has translated
            commands.append(f"{tables} -A FORWARD -i wan0 -m conntrack --ctstate DNAT -j ACCEPT")
        if kind == "rst":
            for chain in ("INPUT", "FORWARD"):
                commands.append(f"{tables} -A {chain} -i wan0 -p tcp --syn -j REJECT --reject-with tcp-reset")
        if program.startswith("ip6"):
            commands.append(f"{tables} -A INPUT -i wan0 -p icmpv6 -j ACCEPT")
        commands += [f"{tables} -A INPUT -i wan0 -j DROP", f"{tables} -A FORWARD -i wan0 -j DROP"]
    if kind != "firewall":
        ports = " --random-fully" if kind == "symmetric" else ""
        commands.append(f"{inside} iptables -w -t nat -A POSTROUTING -o wan0 -j MASQUERADE{ports}")
    return commands
