"""The internet in a box: a scenario that runs, and the faults it can be given."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .namespaces import Corner, environ, environ_of_tests, open_corner
from .plan import line_up, namespaces, wiring
from .scenario import Line, Scenario, Site
from .upnp import miniupnpd, serve_upnp


@contextmanager
def open_lab(scenario: Scenario) -> Generator[Lab]:
    """Build a scenario, and take it down with everything that still runs in it.

    Raises:
        OSError: The machine does not allow it (`why_not` says so beforehand), or lacks a scenario's program.
    """
    with ExitStack() as stack:
        corner = stack.enter_context(open_corner())
        corner.sh(namespaces(scenario))
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="p2pinfer-lab-")))
        lab = Lab(scenario, corner, home)
        stack.callback(lab.end_processes)
        wan = stack.enter_context(_open_wan(scenario, corner))
        lab.wan = wan
        corner.sh(wiring(scenario))
        for site in scenario.sites:
            if "upnp" in site.routers:
                lab.processes.append(serve_upnp(corner, site.router_names[site.routers.index("upnp")], home))
        yield lab


class Wan:
    """The process that carries packets between sites."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send one order, and wait until it has been carried out."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise OSError("the internet has gone away: wan.py ended")
        told: dict[str, Any] = json.loads(answer)
        return told


@contextmanager
def _open_wan(scenario: Scenario, corner: Corner) -> Generator[Wan]:
    process = subprocess.Popen(
        corner.enter([sys.executable, "-m", "tests.lab.wan"]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environ_of_tests(),
    )
    with process:
        try:
            wan = Wan(process)
            wan.ask(
                {
                    site.name: {
                        "line": asdict(site.line),
                        "prefixes": [prefix.hex() for prefix in scenario.prefixes(site)],
                    }
                    for site in scenario.sites
                }
            )
            yield wan
        finally:
            process.kill()


class Lab:
    """A scenario that runs. Made by `open_lab`."""

    def __init__(self, scenario: Scenario, corner: Corner, home: Path) -> None:
        self.scenario = scenario
        self.corner = corner
        self.home = home  # a temporary folder for what the hosts write
        self.wan: Wan
        self.processes: list[subprocess.Popen[Any]] = []  # killed at the end
        self.addresses: dict[str, str] = {}  # of sites that have another than the scenario's

    # ------------------------------------------------------------------ processes

    def popen(self, where: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a program in a host or router; its pid is the program's own."""
        options = {"text": True, "env": environ(), "cwd": self.home, **options}
        process = subprocess.Popen(self.corner.enter(argv, netns=where), **options)
        self.processes.append(process)
        return process

    def run(self, where: str, *argv: str, timeout_s: float = 30.0, check: bool = True) -> str:
        """Run a program in a host or router, and return what it printed.

        Raises:
            OSError: It failed, unless `check` is off.
        """
        done = subprocess.run(
            self.corner.enter(argv, netns=where),
            capture_output=True,
            text=True,
            env=environ(),
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode != 0:
            raise OSError(f"{' '.join(argv)} in {where}: {done.stderr.strip() or done.returncode}")
        return done.stdout

    def end_processes(self) -> None:
        """Kill whatever was started in here and still runs."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            with process:
                pass

    # ------------------------------------------------------------------ faults

    def set_line(self, site: str, line: Line) -> None:
        """Give a site another line from this moment on."""
        self.wan.ask({"site": self.scenario.site(site).name, "line": asdict(line)})

    def counters(self, site: str) -> dict[str, int]:
        """What became of a site's packets so far; the fields of wan.Counters."""
        counters: dict[str, int] = self.wan.ask({})[self.scenario.site(site).name]
        return counters

    def blackhole(self, host: str) -> None:
        """Drop every packet to and from a host, in silence and somewhere on the way: no RST, no ICMP."""
        site = self.scenario.site(host)
        if not site.routers:
            self.set_line(site.name, Line(loss=1.0))
        else:
            self.corner.sh(self._blackhole_rules(site, host, "-I"))

    def heal(self, host: str) -> None:
        """Undo `blackhole`."""
        site = self.scenario.site(host)
        if not site.routers:
            self.set_line(site.name, site.line)
        else:
            self.corner.sh(self._blackhole_rules(site, host, "-D"))

    def _blackhole_rules(self, site: Site, host: str, action: str) -> list[str]:
        # Before conntrack sees what comes from the host, after it has translated back what goes to it.
        inside = f"ip netns exec {site.router_names[-1]}"
        address4, address6 = self.scenario.own_ipv4(host), self.scenario.public_ipv6(host)
        commands: list[str] = []
        for program, address in (("iptables", address4), ("ip6tables", address6)):
            commands += [
                f"{inside} {program} -w -t raw {action} PREROUTING -i lan0 -s {address} -j DROP",
                f"{inside} {program} -w -t mangle {action} POSTROUTING -o lan0 -d {address} -j DROP",
            ]
        return commands

    def link_down(self, site: str) -> None:
        """Take a site off the internet as a dead modem does: its router knows at once, and says so inside."""
        self.corner.sh([f"ip -n {self.scenario.site(site).edge} link set wan0 down"])

    def link_up(self, site: str) -> None:
        """Undo `link_down`. A translating router has forgotten its mappings meanwhile."""
        self.corner.sh(line_up(self.scenario, self.scenario.site(site)))

    def change_address(self, name: str) -> str:
        """Give a site another public IPv4 address, as some carriers do every night; returns it."""
        site = self.scenario.site(name)
        former = self.addresses.get(site.name, self.scenario.public_ipv4(site.name))
        prefix, _, last = former.rpartition(".")
        address = self.addresses[site.name] = f"{prefix}.{int(last) + 1}"
        ip = f"ip -n {site.edge}"
        self.corner.sh(
            [
                f"{ip} address add {address}/32 dev wan0",
                f"{ip} address del {former}/32 dev wan0",
                f"{ip} route replace default dev wan0",
                # The core knows sites by their network. In life the former address is somebody else's, and a
                # port that a router has mapped does not answer there.
                f"ip netns exec {site.edge} iptables -w -t raw -A PREROUTING -i wan0 -d {former} -j DROP",
            ]
        )
        if site.routers:  # translations to the former address go with it
            self.flush_nat(site.edge)
        return address

    def flush_nat(self, router: str) -> None:
        """Let a router forget every flow, as if it had been restarted."""
        names = self.scenario.site(router).router_names
        chosen = [router] if router in names else list(names)
        self.corner.sh([f"ip netns exec {name} conntrack -F >&2" for name in chosen])


def lacks(scenario: Scenario) -> str:
    """What this machine lacks for a scenario beyond what every lab needs; empty if nothing."""
    if any("upnp" in site.routers for site in scenario.sites) and not miniupnpd():
        return "miniupnpd is not installed (package miniupnpd), and the scenario has a UPnP router"
    return ""
