"""`p2pinfer doctor`: how this computer is reached from the internet, and what would make it better."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .invocation import ANNOUNCE, BOOTSTRAP, DATA_DIR, Invocation, command, setting
from .terminal import write_out

if TYPE_CHECKING:
    from p2pinfer.node.reach import ReachStatus
    from p2pinfer.node.swarm import SwarmMember

KNOWN_S = 10.0  # how long it may take to find out; a node takes no longer
RELAYS_S = 3.0  # on top, for places at relays


@command("doctor", examples=["p2pinfer doctor", "p2pinfer doctor --json | jq .reachability"])
@setting("host.listen", "--listen MULTIADDR", "May be repeated. [default: a free TCP port]", multiple=True)
@ANNOUNCE
@BOOTSTRAP
@DATA_DIR
def doctor(call: Invocation) -> None:
    """Find out how peers reach this computer, and what you could do about it."""
    # What follows takes a second to import: libp2p.
    import trio

    from p2pinfer.config import SharedConfig
    from p2pinfer.node.host_config import HostConfig
    from p2pinfer.node.identity import new_identity
    from p2pinfer.node.swarm import open_swarm

    from .running import run

    settings = call.settings(HostConfig)
    shared = settings.build(SharedConfig)
    config = settings.build(HostConfig)

    async def main() -> None:
        async with open_swarm(new_identity(), config, shared.bootstrap, shared.data_dir) as member:
            with trio.move_on_after(KNOWN_S):
                await member.reach.known.wait()
            if member.reach.reachability.kind == "private" and config.relays:
                with trio.move_on_after(RELAYS_S):
                    while len(member.reach.status.relays) < config.relays:
                        await trio.sleep(0.05)
            write_out(report_json(member) if call.json else report(member))

    run(main)


def report(member: SwarmMember) -> str:
    """What was found out, a line each, for people."""
    from p2pinfer.node.reachability import describe

    status = member.reach.status
    seen = status.reachability
    lines = [
        ("this computer", describe(seen)),
        (
            "seen from outside as",
            ", ".join(seen.outside_ips) or "nobody outside has looked",
        ),
        ("router", _NAT[seen.nat]),
        ("UPnP", status.upnp),
        ("relays", ", ".join(status.relays) or "none hold a place for it"),
        ("peers reached", _connections(member)),
        *(("advice", each) for each in advice(status, member.describe_failures())),
    ]
    width = max(len(name) for name, _ in lines)
    return "".join(f"{name:<{width}}  {said}\n" for name, said in lines)


def report_json(member: SwarmMember) -> str:
    """The same as one object."""
    status = member.reach.status
    seen = status.reachability
    said = {
        "reachability": seen.kind,
        "nat": seen.nat,
        "outside": list(seen.outside_ips),
        "addrs": list(member.addrs),
        "observers": list(seen.observers),
        "upnp": status.upnp,
        "relays": list(status.relays),
        "punched": list(status.punched),
        "relayed": list(status.relayed),
        "connections": {
            peer_id: member.host.connection_kind(peer_id) for peer_id in member.host.connected_peers()
        },
        "advice": advice(status, member.describe_failures()),
    }
    return json.dumps(said) + "\n"


def advice(status: ReachStatus, failures: str = "") -> list[str]:
    """What the user could do, the most useful thing first; empty if there is nothing to improve."""
    seen = status.reachability
    said: list[str] = []
    if failures:
        said.append(f"some bootstrap peers do not answer: {failures}")
    if seen.kind == "unknown":
        said.append(
            "no peer outside the local network has been reached: name one by --bootstrap, "
            "and see whether this computer is on the internet"
        )
    if seen.kind == "private" and seen.nat == "firewall":
        said.append("let incoming TCP connections through the firewall, to the port given by --listen")
    elif seen.kind == "private":
        said.append(
            "switch on UPnP in the router, or forward a TCP port to this computer and name it: "
            "--listen /ip4/0.0.0.0/tcp/PORT"
        )
        if seen.nat == "symmetric":
            said.append("this router changes ports, so peers behind most others reach it through relays only")
    if seen.kind == "private" and not status.relays:
        said.append("no relay holds a place for this computer: nobody behind another router can reach it")
    return said


_NAT = {
    "none": "none in between",
    "firewall": "none; a firewall lets only answers in",
    "port-preserving": "translates addresses and keeps ports: holes can be punched",
    "symmetric": "translates addresses and takes another port for every connection: no holes can be punched",
    "unknown": "not known",
}


def _connections(member: SwarmMember) -> str:
    kinds = [member.host.connection_kind(peer_id) for peer_id in member.host.connected_peers()]
    return f"{kinds.count('direct')} directly, {kinds.count('relayed')} through relays"
