"""`p2pinfer doctor`: hardware, reachability, and how to improve both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from p2pinfer.cli.invocation import ANNOUNCE, BOOTSTRAP, DATA_DIR, SWARM_KEY, Invocation, command, setting
from p2pinfer.cli.output.plain import printable
from p2pinfer.cli.output.terminal import note, write_out

if TYPE_CHECKING:
    from p2pinfer.config import Settings
    from p2pinfer.node.reach.reach import ReachStatus
    from p2pinfer.node.swarm.membership import SwarmMember

    from .checkup import Finding

_PACKAGES = ("torch", "trio", "tokenizers", "safetensors", "huggingface_hub", "llguidance", "triton")
KNOWN_S = 10.0  # how long it may take to find out; a node takes no longer
RELAYS_S = 3.0  # on top, for places at relays


@command(
    "doctor",
    examples=[
        "p2pinfer doctor",
        "p2pinfer doctor --swarm-key swarm.key --bootstrap /ip4/192.0.2.7/tcp/4001/p2p/12D3KooW...",
        "p2pinfer doctor --report > report.txt",
        "p2pinfer doctor --json | jq '.checks[] | select(.wrong)'",
    ],
)
@setting(
    "host.listen",
    "--listen MULTIADDR",
    "Listen on this address. May be repeated. [default: a free TCP port]",
    multiple=True,
)
@ANNOUNCE
@BOOTSTRAP
@SWARM_KEY
@DATA_DIR
@click.option("--report", "is_public", is_flag=True, help="Print a report that can be shown in public.")
def doctor(call: Invocation, is_public: bool) -> None:
    """Check hardware and network, and suggest improvements.

    The exit code is 1 if a check fails.

    With --report, the versions and the settings that matter are added, and addresses, peer ids and names of
    users and computers are replaced by numbers.
    """
    # What follows takes seconds to import: libp2p, torch.
    import trio

    from p2pinfer.cli.running import run
    from p2pinfer.config import SharedConfig
    from p2pinfer.node.host_config import HostConfig
    from p2pinfer.node.swarm.bootstrap import bootstrap_peers
    from p2pinfer.node.swarm.membership import open_swarm
    from p2pinfer.node.transport.identity import new_identity

    settings = call.settings(HostConfig)
    shared = settings.build(SharedConfig)
    config = settings.build(HostConfig)
    found: list[Finding] = []

    def tell(what: str) -> None:
        if not (call.json or call.quiet):
            note(f"checking {what} ...")

    async def main() -> None:
        from .checkup import check_all

        # In a thread, so that Ctrl-C need not wait for a card or a disk that hangs.
        found.extend(
            await trio.to_thread.run_sync(
                lambda: list(check_all(shared.data_dir, shared.cache_dir, tell)), abandon_on_cancel=True
            )
        )
        tell(f"whether peers can reach this computer (up to {KNOWN_S + RELAYS_S:.0f} s)")
        async with open_swarm(new_identity(), config, shared.bootstrap, shared.data_dir) as member:
            with trio.move_on_after(KNOWN_S):
                await member.reach.known.wait()
            if member.reach.reachability.kind == "private" and config.relays:
                with trio.move_on_after(RELAYS_S):
                    while len(member.reach.status.relays) < config.relays:
                        await trio.sleep(0.05)
            found.extend(check_network(member))
            about = about_software(settings) if is_public else []
            said = report_json(member, [*about, *found]) if call.json else report([*about, *found])
            write_out(without_names(said, as_json=call.json) if is_public else said)

    bootstrap_peers(shared.bootstrap, shared.data_dir)  # a wrong address is told before anything is measured
    tell("the hardware")
    run(main)
    if any(each.wrong for each in found):
        raise click.exceptions.Exit(1)


def check_network(member: SwarmMember) -> list[Finding]:
    """Reachability of this computer, and by whom."""
    from p2pinfer.node.reach.reachability import describe

    from .checkup import Finding

    status, failures = member.reach.status, member.describe_failures()
    seen = status.reachability
    unreachable = seen.kind == "private" and not status.relays
    connected = bool(member.host.connected_peers())
    said = advice(status, failures)
    return [
        Finding("this computer", describe(seen), unreachable, "; ".join(said[bool(failures) :])),
        Finding(
            "public address", ", ".join(seen.outside_ips) or "not known: no outside peer has reported it"
        ),
        Finding("router", _NAT[seen.nat]),
        Finding("UPnP", status.upnp),
        Finding("relays", ", ".join(status.relays) or "no reservation at any relay"),
        Finding(
            "connected peers", _connections(member), bool(failures) and not connected, failures and said[0]
        ),
    ]


def about_software(settings: Settings) -> list[Finding]:
    """Versions, and the settings that somebody has chosen; of secrets these name the file only."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from .checkup import Finding

    versions: list[str] = []
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    chosen = [f"{each.key}={each.value} ({each.origin})" for each in settings if each.origin != "default"]
    return [
        Finding("p2pinfer", version("p2pinfer")),
        Finding("system", f"{platform.platform()}, {platform.machine()}"),
        Finding("Python", f"{platform.python_version()} ({platform.python_implementation()})"),
        Finding("packages", ", ".join(versions)),
        Finding("settings", "; ".join(chosen) or "all are the defaults"),
    ]


def without_names(said: str, *, as_json: bool) -> str:
    """A report, as text or JSON, that tells nobody whose it is."""
    from p2pinfer.cli.output.redaction import Redactor

    redactor = Redactor()
    return json.dumps(redactor.document(json.loads(said))) + "\n" if as_json else redactor.text(said)


def report(found: Sequence[Finding]) -> str:
    """Findings for people, one per line."""
    width = max(len(each.name) for each in found)
    lines: list[str] = []
    for each in found:
        lines.append(f"{each.name:<{width}}  {printable(each.said)}")
        if each.advice:
            lines.append(f"{'':<{width}}  {'failed' if each.wrong else 'advice'}: {printable(each.advice)}")
    wrong = sum(each.wrong for each in found)
    lines.append(f"{wrong} check{'s' * (wrong > 1)} failed" if wrong else "all checks passed")
    return "\n".join(lines) + "\n"


def report_json(member: SwarmMember, found: Sequence[Finding] = ()) -> str:
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
        "checks": [asdict(each) for each in found],
        "wrong": sum(each.wrong for each in found),
    }
    return json.dumps(said) + "\n"


def advice(status: ReachStatus, failures: str = "") -> list[str]:
    """Possible improvements, the most useful first; empty if there are none."""
    seen = status.reachability
    said: list[str] = []
    if failures:
        said.append(f"some bootstrap peers do not answer: {failures}")
    if seen.kind == "unknown":
        said.append(
            "no peer outside the local network was reached: give one by --bootstrap, "
            "and check the internet connection"
        )
    if seen.kind == "private" and seen.nat == "firewall":
        said.append("allow incoming TCP connections in the firewall, to the port given by --listen")
    elif seen.kind == "private":
        said.append(
            "enable UPnP in the router, or forward a TCP port to this computer and listen on it: "
            "--listen /ip4/0.0.0.0/tcp/PORT"
        )
        if seen.nat == "symmetric":
            said.append(
                "the router's NAT is symmetric: peers behind most other routers need a relay to connect"
            )
    if seen.kind == "private" and not status.relays:
        said.append("no relay has accepted a reservation: no peer can reach this computer")
    return said


_NAT = {
    "none": "no NAT",
    "firewall": "no NAT; a firewall blocks incoming connections",
    "port-preserving": "NAT that keeps ports: hole punching works",
    "symmetric": "symmetric NAT, with another port for each connection: hole punching mostly fails",
    "unknown": "unknown",
}


def _connections(member: SwarmMember) -> str:
    kinds = [member.host.connection_kind(peer_id) for peer_id in member.host.connected_peers()]
    return f"{kinds.count('direct')} directly, {kinds.count('relayed')} through relays"
