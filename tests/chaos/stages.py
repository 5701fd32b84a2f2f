"""Where hops come to harm: processes on loopback, and the hosts of a simulated internet.

Both have hops for the spans of a route, others that hold every block and can take over, and faults by name
that are mended afterwards. Peers are called by their place: first, middle, last, spare1, spare2, ...
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from ..lab.commands import Command, Commands, bootstrap, open_commands
from ..lab.lab import Lab, open_lab
from ..lab.namespaces import environ_of_tests
from ..lab.pairs import reachable, start_relays
from ..lab.scenarios import RELAYS, named
from .processes import ROOT, NodeProcess, Zygote

SPANS: Final[Mapping[str, tuple[int, int]]] = {"first": (0, 3), "middle": (3, 6), "last": (6, 8)}
SPARES: Final = 3
FLAP_S: Final = 4.0  # for which a line that flaps is down


class Stage(Protocol):
    """Hops and their spares, and what can happen to them."""

    @property
    def anywhere(self) -> bool:
        """Whether peers have to find out first how they can be reached."""
        ...

    def peers(self, fault: str, victims: Sequence[str]) -> Mapping[str, str]:
        """Peer ids by place, for a case in which this happens to these."""
        ...

    def harm(self, fault: str, victims: Sequence[str]) -> None:
        """Let it happen, now."""
        ...

    def mend(self) -> None:
        """Put everything right again, and wait until everybody serves."""
        ...

    def watched(self) -> subprocess.Popen[str]:
        """A process of watched.py that knows where to join."""
        ...


class Loopback:
    """Node processes on this machine; `kill -9` and SIGSTOP."""

    faults = ("kill -9", "SIGSTOP")
    anywhere = False

    def __init__(self, zygote: Zygote, home: Path) -> None:
        spans = {**SPANS, **{f"spare{number + 1}": (0, 8) for number in range(SPARES)}}
        self._nodes = {place: NodeProcess(zygote, home / place, span) for place, span in spans.items()}
        self._harmed: set[str] = set()
        self._join = [self._nodes[f"spare{SPARES}"].address]
        for node in self._nodes.values():
            node.run(self._join)
        for node in self._nodes.values():
            node.wait_ready()

    def peers(self, fault: str, victims: Sequence[str]) -> Mapping[str, str]:
        return {place: node.peer_id for place, node in self._nodes.items()}

    def harm(self, fault: str, victims: Sequence[str]) -> None:
        for place in victims:
            self._nodes[place].signal(signal.SIGKILL if fault == "kill -9" else signal.SIGSTOP)
            self._harmed.add(place)

    def mend(self) -> None:
        killed: list[NodeProcess] = []
        for place in self._harmed:
            node = self._nodes[place]
            node.signal(signal.SIGCONT)
            try:
                node.wait_ended(0.5)
            except TimeoutError:
                continue
            node.run(self._join)
            killed.append(node)
        for node in killed:
            node.wait_ready()
        self._harmed.clear()

    def watched(self) -> subprocess.Popen[str]:
        return _popen(_watch_command(self._join))


class Internet:
    """Nodes in homes behind routers, two relays, and a client in a home of its own.

    What happens to a line or a host happens to hops that are connected directly. What happens to a router's
    table, or to relays, happens to hops behind symmetric routers, whose connections depend on it.
    """

    faults = ("blackhole", "link flap", "NAT table flush", "relay death")
    anywhere = True

    def __init__(self, lab: Lab, commands: Commands) -> None:
        self._lab = lab
        self._commands = commands
        self._mends: list[Callable[[], None]] = []
        self._join = start_relays(commands)
        self._relays = commands.started[: len(RELAYS)]
        nodes: dict[str, Command] = {}
        for number, span in enumerate(SPANS.values(), start=1):
            for kind in "ns":
                nodes[f"{kind}{number}"] = self._node(f"{kind}{number}", span)
        for host in ("p1", "p2", "s4"):
            nodes[host] = self._node(host, (0, 8))
        self._ids = {host: reachable(node) for host, node in nodes.items()}

    def _node(self, host: str, span: tuple[int, int]) -> Command:
        return self._commands.node(host, "--blocks", "{}:{}".format(*span), *self._join)

    def _hosts(self, fault: str, victims: Sequence[str]) -> dict[str, str]:
        """Hosts by place. Who is not to be harmed is behind a router that lets holes be punched."""
        depends = fault in ("NAT table flush", "relay death")
        hosts = {
            place: f"{'s' if depends and place in victims else 'n'}{number}"
            for number, place in enumerate(SPANS, start=1)
        }
        spares = ("s4", "p1", "p2") if depends and "spare1" in victims else ("p1", "p2", "s4")
        return {**hosts, **{f"spare{number}": host for number, host in enumerate(spares, start=1)}}

    def peers(self, fault: str, victims: Sequence[str]) -> Mapping[str, str]:
        return {place: self._ids[host] for place, host in self._hosts(fault, victims).items()}

    def harm(self, fault: str, victims: Sequence[str]) -> None:
        hosts = [self._hosts(fault, victims)[place] for place in victims]
        match fault:
            case "blackhole":
                for host in hosts:
                    self._lab.blackhole(host)
                    self._mends.append(partial(self._lab.heal, host))
            case "link flap":
                for host in hosts:
                    self._lab.link_down(host)
                    up = threading.Timer(FLAP_S, self._lab.link_up, [host])
                    up.start()
                    self._mends.append(up.join)
            case "NAT table flush":
                for host in hosts:
                    self._lab.flush_nat(host)
            case _:
                for relay in self._relays:
                    relay.kill()

    def mend(self) -> None:
        while self._mends:
            self._mends.pop()()

    def watched(self) -> subprocess.Popen[str]:
        command = self._lab.corner.enter(_watch_command(self._join[1::2]), netns="me")
        return _popen(command, env=environ_of_tests())


@contextmanager
def open_loopback(home: Path) -> Generator[Loopback]:
    """Node processes, ended with the block."""
    zygote = Zygote()
    try:
        yield Loopback(zygote, home)
    finally:
        zygote.close()


@contextmanager
def open_internet() -> Generator[Internet]:
    """A lab with everybody in it, taken down with the block."""
    with open_lab(named("failover")) as lab, open_commands(lab) as commands:
        yield Internet(lab, commands)


def _watch_command(addresses: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "tests.chaos.watched", *bootstrap(addresses)]


def _popen(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )
