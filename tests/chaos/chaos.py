"""Eight nodes, four clients, a fault every few seconds: everything that was promised arrives.

Nodes and clients die, freeze, leave, sleep, move and read slowly; crowds of strangers attack nodes in one way
after the other; clients begin with a bootstrap node that tells of nobody but invented peers.

    start -> warm up -> vitals -> clients and faults for so long -> all is mended -> clients finish -> vitals

A generation is promised when its client begins it, unless the client itself is killed. It must end with the
ids that transformers gives, and soon. Nodes that lived through all of it must hold what they held before.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from .crowd.victims import Victims, open_victims
from .processes import ClientProcess, CrowdProcess, NodeProcess, Zygote
from .requests import expected_ids, make_requests
from .schedule import ENDING, KINDS, Fault, Kind, plan_faults, whose_fault
from .vitals import Vitals, describe, read_vitals, resident_mib

SPANS = ((0, 3), (3, 6), (6, 8), (0, 4), (4, 8), (2, 6), (0, 2), (5, 8))  # every block on three nodes
SURVIVORS = (0, 1, 2)  # hold all blocks between them; frozen now and then, never ended
CLIENTS = 4
WAIT_S = 120.0  # how long a client waits for blocks that are gone
HANG_S = WAIT_S + 60.0  # after which a generation counts as hung, not counting what its client slept
CROWD_ENDS_S = (
    120.0  # after it was killed: of lowest priority, it waits for a processor that nobody else wants
)
SETTLE_S = 3.0  # in which connections of who has gone are noticed
QUIET_S = 60.0  # until a node has noticed that nobody is there any more
SAY_EVERY_S = 300.0  # how it goes
CROWD = 20  # identities
KNOCKS_PER_S = 1.0  # of all nodes and clients together at an address that is nobody's, in any minute
STUTTER_S = 0.4  # of which a client that reads slowly is stopped for three quarters
LEAVE_S = 120.0  # for a node to leave after a SIGTERM, on a machine that may be very busy


@dataclass
class Outcome:
    """What came of a run."""

    seed: int
    duration_s: float
    faults: Counter[str] = field(default_factory=Counter[str])
    generations: int = 0
    tokens: int = 0
    lost_with_client: int = 0
    failovers: int = 0
    resumed: int = 0
    stalls_s: list[float] = field(default_factory=list[float])  # of generations with a failover, the longest
    knocks: str = ""
    vitals: list[tuple[str, Vitals, Vitals]] = field(default_factory=list[tuple[str, Vitals, Vitals]])
    failures: list[str] = field(default_factory=list[str])

    def report(self) -> str:
        """For people, a figure a line."""
        stalls = sorted(self.stalls_s) or [0.0]
        lines = [
            f"seed {self.seed}, {self.duration_s:.0f} s, {len(SPANS)} nodes, {CLIENTS} clients",
            "faults: " + ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items())),
            f"generations ended right: {self.generations} of {self.tokens} tokens together, {self.resumed} "
            f"of them resumed by token; gone with a client that was killed: {self.lost_with_client}",
            f"failovers: {self.failovers}; longest stall of a generation that had one: "
            f"median {median(stalls):.2f} s, 95 % {stalls[int(0.95 * (len(stalls) - 1))]:.2f} s, "
            f"longest {stalls[-1]:.2f} s",
        ]
        lines.append(f"connections at addresses that are nobody's: {self.knocks}")
        for name, before, after in self.vitals:
            lines += [f"{name} before: {describe(before)}", f"{name} after:  {describe(after)}"]
        lines += [f"FAILED {failure}" for failure in self.failures]
        return "\n".join(lines)


def run_chaos(
    seed: int,
    duration_s: float,
    home: Path,
    say: Callable[[str], None] = print,
    kinds: Sequence[Kind] = KINDS,
    *,
    waits: bool = False,
) -> Outcome:
    """One run. Nothing is left running, whatever happens.

    Args:
        waits: Let a fault wait for a node that has not come back from the last one, in place of sparing it.
            Only so has a short run all its faults on a slow machine.
    """
    say(f"chaos seed {seed}: `python -m tests.chaos --seed {seed} --duration {duration_s:g}` repeats it")
    zygote = Zygote()
    try:
        with open_victims() as victims:
            return _Run(zygote, seed, duration_s, home, say, kinds, victims, waits).run()
    finally:
        zygote.close()


class _Run:
    def __init__(
        self,
        zygote: Zygote,
        seed: int,
        duration_s: float,
        home: Path,
        say: Callable[[str], None],
        kinds: Sequence[Kind],
        victims: Victims,
        waits: bool,
    ) -> None:
        self._zygote = zygote
        self._waits = waits
        self._say = say
        self._outcome = Outcome(seed, duration_s)
        self._nodes = [NodeProcess(zygote, home / f"node-{i}", span) for i, span in enumerate(SPANS)]
        self._clients = [ClientProcess(zygote, home / f"client-{i}") for i in range(CLIENTS)]
        self._kinds = kinds
        self._victims = victims
        self._crowds = [CrowdProcess(zygote, home / f"crowd-{i}") for i in range(len(SPANS))]
        self._lures = [CrowdProcess(zygote, home / f"lure-{i}") for i in range(CLIENTS)]
        self._stutters: set[int] = set()  # clients
        self._bootstrap = [self._nodes[index].address for index in SURVIVORS]
        self._seeds = random.Random(seed)
        self._expected = expected_ids(make_requests())
        self._began: dict[int, dict[str, Any]] = {}  # client -> the generation it is at
        self._held_mib: dict[str, float] = {}  # by survivors, until half-time
        self._mends: list[tuple[float, Fault]] = []  # when, and what to put right
        self._leaving: dict[int, float] = {}  # node -> by when it must have ended

    def run(self) -> Outcome:
        for node in self._nodes:
            node.run(self._bootstrap)
        for node in self._nodes:
            node.wait_ready()
        self._say(f"{len(self._nodes)} nodes serve")
        self._start_clients()
        self._go_on(until=time.monotonic() + min(20.0, self._outcome.duration_s / 3), faults=[])
        self._stop_clients()
        before = self._vitals()
        self._start_clients()
        plan = plan_faults(
            self._outcome.seed,
            self._outcome.duration_s,
            nodes=len(self._nodes),
            clients=CLIENTS,
            survivors=SURVIVORS,
            kinds=self._kinds,
        )
        self._go_on(until=time.monotonic() + self._outcome.duration_s, faults=plan)
        while self._mends:
            self._go_on(until=self._mends[0][0], faults=[])
        self._stop_clients()
        after = self._vitals()
        self._outcome.vitals = [(name, before[name], after[name]) for name in before]
        self._check_growth()
        self._check_victims()
        self._end_nodes()
        return self._outcome

    # ------------------------------------------------------------------ clients

    def _start_clients(self) -> None:
        for client in self._clients:
            client.run(self._bootstrap, self._seeds.randrange(1 << 30), WAIT_S)

    def _stop_clients(self) -> None:
        """Let them finish what they are at."""
        for client in self._clients:
            client.signal(signal.SIGUSR1)
        deadline = time.monotonic() + HANG_S
        while any(client.exit_code is None for client in self._clients):
            self._hear()
            self._zygote.listen(0.2)
            if time.monotonic() > deadline:
                self._fail("clients do not come to an end")
                for client in self._clients:
                    client.signal(signal.SIGKILL)
        self._hear()
        for client in self._clients:
            if client.exit_code:
                self._fail(f"{client.home.name} ended with {client.exit_code}: {client.said()[-2000:]}")

    def _hear(self) -> None:
        """What the clients have to say, and whether one is silent for too long."""
        for index, client in enumerate(self._clients):
            for event in client.events():
                self._take(index, event)
            began = self._began.get(index)
            if began is not None and time.time() - began["at"] > HANG_S:
                self._fail(f"client {index}: request {began['request']} hangs for {HANG_S:g} s")
                self._began.pop(index)

    def _take(self, index: int, event: dict[str, Any]) -> None:
        outcome = self._outcome
        if event["event"] == "began":
            self._began[index] = event
            return
        self._began.pop(index, None)
        if event["event"] == "failed":
            self._fail(f"client {index}: request {event['request']} failed: {event['error']}")
            return
        if event["ids"] != self._expected[event["request"]]:
            self._fail(f"client {index}: request {event['request']} gave {event['ids']}")
            return
        outcome.generations += 1
        outcome.tokens += len(event["ids"])
        outcome.failovers += event["failovers"]
        outcome.resumed += event["resumed"]
        if event["failovers"]:
            outcome.stalls_s.append(event["stall_s"])

    def _fail(self, what: str) -> None:
        self._say(f"FAILED {what}")
        self._outcome.failures.append(what)

    # ------------------------------------------------------------------ faults

    def _go_on(self, until: float, faults: Sequence[Fault]) -> None:
        """Listen, harm and mend until then, or if faults wait for their targets, until all have come."""
        began = time.monotonic()
        due = list(faults)
        say_at = began + SAY_EVERY_S
        while (now := time.monotonic()) < until or (due and self._waits and now < until + HANG_S):
            if now >= say_at:
                say_at += SAY_EVERY_S
                self._say_how_far(now - began)
            while due and began + due[0].at_s <= now and not (self._waits and self._is_away(due[0])):
                self._harm(due.pop(0))
            while self._mends and self._mends[0][0] <= now:
                self._mend(self._mends.pop(0)[1])
            for client in (self._clients[index] for index in self._stutters):
                client.signal(signal.SIGSTOP if now % STUTTER_S < STUTTER_S * 0.75 else signal.SIGCONT)
            self._hear()
            self._watch_nodes()
            self._zygote.listen(0.1)
        while self._mends and self._mends[0][0] <= until:
            self._mend(self._mends.pop(0)[1])

    def _say_how_far(self, seconds: float) -> None:
        outcome = self._outcome
        mib = {node.home.name: resident_mib(node.pid) for node in (self._nodes[index] for index in SURVIVORS)}
        if seconds <= outcome.duration_s / 2:
            self._held_mib = mib
        held = ", ".join(f"{each:.0f}" for each in mib.values())
        self._say(
            f"{seconds:8.1f} s  {outcome.generations} generations, {outcome.failovers} failovers, "
            f"{len(outcome.failures)} failures; survivors hold {held} MiB"
        )

    def _is_away(self, fault: Fault) -> bool:
        """Whether the node that it is to harm has not come back yet."""
        return whose_fault(fault.kind) != "client" and not self._nodes[fault.target].serves

    def _harm(self, fault: Fault) -> None:
        if self._is_away(fault):
            self._say(f"{fault.at_s:8.1f} s  {fault.kind} {fault.target} spared: it has not come back yet")
            return
        self._outcome.faults[fault.kind] += 1
        self._say(f"{fault.at_s:8.1f} s  {fault.kind} {fault.target} for {fault.lasts_s:.1f} s")
        self._mends.append((time.monotonic() + fault.lasts_s, fault))
        self._mends.sort(key=lambda mend: mend[0])
        match fault.kind:
            case "kill" | "move":
                self._nodes[fault.target].signal(signal.SIGKILL)
            case "freeze" | "sleep":
                self._nodes[fault.target].signal(signal.SIGSTOP)
            case "doze":
                self._clients[fault.target].signal(signal.SIGSTOP)
            case "stutter":
                self._stutters.add(fault.target)
            case "leave":
                self._nodes[fault.target].signal(signal.SIGTERM)
                self._leaving[fault.target] = time.monotonic() + LEAVE_S
            case "vanish":
                self._kill_client(fault.target)
            case "lure":
                self._kill_client(fault.target)
                lure = self._lures[fault.target]
                lure.run(self._nodes[SURVIVORS[0]], self._victims.addrs, identities=0, introduces=True)
                bootstrap = [lure.address, *self._bootstrap]
                self._clients[fault.target].run(bootstrap, self._seeds.randrange(1 << 30), WAIT_S)
            case _:
                node = self._nodes[fault.target]
                flags = ("--kinds", fault.kind)
                self._crowds[fault.target].run(node, self._victims.addrs, *flags, identities=CROWD)

    def _kill_client(self, index: int) -> None:
        client = self._clients[index]
        client.signal(signal.SIGKILL)
        client.wait_ended(10)
        for event in client.events():
            self._take(index, event)
        self._outcome.lost_with_client += self._began.pop(index, None) is not None

    def _mend(self, fault: Fault) -> None:
        match fault.kind:
            case "vanish":
                client = self._clients[fault.target]
                client.run(self._bootstrap, self._seeds.randrange(1 << 30), WAIT_S)
            case "freeze" | "sleep":
                self._nodes[fault.target].signal(signal.SIGCONT)
            case "doze" | "stutter":
                self._stutters.discard(fault.target)
                self._clients[fault.target].signal(signal.SIGCONT)
                if fault.kind == "doze" and fault.target in self._began:
                    self._began[fault.target]["at"] += fault.lasts_s  # in which it could do nothing
            case "kill" | "move" | "leave":
                self._restart(fault)
            case "lure":
                self._end_crowd(self._lures[fault.target])
            case _:
                self._end_crowd(self._crowds[fault.target])

    def _end_crowd(self, crowd: CrowdProcess) -> None:
        if crowd.exit_code is not None:
            why = f"ended by itself with {crowd.exit_code}"
            self._fail(f"{crowd.home.name} {why}: {crowd.said()[-2000:]}")
        crowd.signal(signal.SIGKILL)
        crowd.wait_ended(CROWD_ENDS_S)

    def _restart(self, fault: Fault) -> None:
        """Start a node anew once it has ended."""
        node = self._nodes[fault.target]
        try:
            exit_code = node.wait_ended(LEAVE_S)
        except TimeoutError as exc:
            self._fail(str(exc))
            node.signal(signal.SIGKILL)
            node.wait_ended(10)
        else:
            if fault.kind == "leave" and exit_code:
                self._fail(f"node {fault.target} left with exit code {exit_code}: {node.said()[-2000:]}")
        self._leaving.pop(fault.target, None)
        if fault.kind == "move":
            node.move()
        node.run(self._bootstrap)

    def _watch_nodes(self) -> None:
        """Nobody ends unasked."""
        harmed = {fault.target for _, fault in self._mends if fault.kind in ENDING}
        for index, node in enumerate(self._nodes):
            if index not in harmed and node.exit_code is not None:
                self._fail(f"node {index} ended with {node.exit_code}: {node.said()[-2000:]}")
                node.run(self._bootstrap)

    # ------------------------------------------------------------------ what is left behind

    def _vitals(self) -> dict[str, Vitals]:
        """Of every survivor, once it has nothing to do any more and its connections have settled."""
        deadline = time.monotonic() + QUIET_S
        found: dict[str, Vitals] = {}
        connections: dict[str, int] = {}  # at the last look
        while True:
            for node in (self._nodes[index] for index in SURVIVORS):
                name = node.home.name
                if name in found:
                    continue
                vitals = read_vitals(node.pid, node.home / "vitals.json")
                settled = vitals.sessions == 0 and vitals.connections == connections.get(name)
                connections[name] = vitals.connections
                if settled or time.monotonic() > deadline:
                    found[name] = vitals
                    self._say(f"{name}: {describe(vitals)}")
            if len(found) == len(SURVIVORS):
                return found
            self._zygote.listen(SETTLE_S)

    def _check_growth(self) -> None:
        for name, before, after in self._outcome.vitals:
            half_way = before if name not in self._held_mib else replace(before, rss_mib=self._held_mib[name])
            for what, grown in after.excess(half_way).items():
                doing = f": {after.more_doing(before)}" if what == "tasks" else ""
                self._fail(f"{name} holds {grown:g} {what} more than before{doing}")

    def _check_victims(self) -> None:
        """Nobody outside is knocked at, whoever names its address."""
        knocks = self._victims.busiest(60.0)
        self._outcome.knocks = f"{len(self._victims.knocks)}, at one address {knocks:.2f} a second at most"
        if knocks > KNOCKS_PER_S:
            self._fail(f"an address of nobody's was dialled {knocks:.2f} times a second")

    def _end_nodes(self) -> None:
        for node in self._nodes:
            node.signal(signal.SIGTERM)
        for node in self._nodes:
            with suppress(TimeoutError):
                if node.wait_ended(LEAVE_S) == 0:
                    if "Traceback" in node.said():
                        self._fail(f"{node.home.name} said {node.said()[-2000:]}")
                    continue
            self._fail(f"{node.home.name} does not leave: {node.exit_code}")
