"""Whole p2pinfer processes across the lab's internet: a few pairs always, faults on request."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from tests.chaos.requests import tokenizer
from tests.e2e.support import prompt_of

from .commands import Command, Commands, open_commands
from .lab import lacks, open_lab
from .pairs import PROMPT, generate, leave, reachable, start_relays, timed
from .reference import greedy_ids
from .scenarios import named

pytestmark = pytest.mark.slow

on_request = pytest.mark.skipif(not os.environ.get("LAB"), reason="takes minutes in all; `make lab` runs it")
SPANS = ("0:3", "3:6", "6:8")


@contextmanager
def swarm_in(scenario: str) -> Generator[tuple[Commands, list[str]]]:
    """A lab with its relays running, and the flags by which others join them."""
    chosen = named(scenario)
    if obstacle := lacks(chosen):
        pytest.skip(obstacle)
    with open_lab(chosen) as lab, open_commands(lab) as commands:
        yield commands, start_relays(commands, [host for host in chosen.hosts if host.startswith("relay")])


def assert_greedy(client: Command, tokens: int, prompt: str = PROMPT) -> None:
    """The generation gave what it gives without a network in between."""
    assert client.wait() == 0, client.err
    assert tuple(json.loads(client.out)["token_ids"]) == greedy_ids(prompt, tokens)


@pytest.mark.usefixtures("in_a_lab")
def test_a_node_at_home_serves_clients_behind_other_routers() -> None:
    with swarm_in("homes") as (commands, flags):
        node = commands.node("a", "--blocks", "0:8", *flags)
        peer_id = reachable(node)
        route = [(peer_id, "0:8")]
        clients = {host: generate(commands, host, 48, [route], flags) for host in ("b", "s")}
        for client in clients.values():
            assert_greedy(client, 48)
        neighbour = timed("client", "port-preserving", "port-preserving", clients["b"], peer_id)
        assert (neighbour.how, neighbour.why) == ("direct", "")
        stranger = timed("client", "port-preserving", "symmetric", clients["s"], peer_id)
        assert stranger.how == "relayed"
        leave([node])


# ---------------------------------------------------------------------- three nodes and a client at home


def generate_in_three(
    fault: Callable[[Commands, dict[str, Command]], None] | None = None,
    tokens: int = 160,
    more_flags: Sequence[str] = (),
    prompt: str = PROMPT,
) -> tuple[dict[str, Any], dict[str, str]]:
    """A generation over n1, n2 and n3, and a fault in the middle; what it told, and what nodes logged."""
    with swarm_in("volunteers") as (commands, flags):
        nodes = {
            host: commands.node(host, "--blocks", span, *flags, *more_flags)
            for host, span in zip(("n1", "n2", "n3"), SPANS, strict=True)
        }
        route = [(reachable(node), span) for node, span in zip(nodes.values(), SPANS, strict=True)]
        client = generate(commands, "me", tokens, [route], [*flags, *more_flags], prompt)
        nodes["n3"].event("session_opened")
        if fault is not None:
            fault(commands, {**nodes, "me": client})
            client.wait_until(lambda: True, "its going on")
            assert client.exit_code is None, "the generation was over before the fault"
        assert_greedy(client, tokens, prompt)
        return json.loads(client.out), {each.host: each.err for each in (client, *nodes.values())}


MOVED = re.compile(r"session\.moved peer=\S+ pause_ms=(\d+)")


@on_request
@pytest.mark.usefixtures("in_a_lab")
def test_edges_that_become_direct_in_the_middle_cost_a_step_at_most_and_outlive_their_relays() -> None:
    def watch(commands: Commands, hosts: dict[str, Command]) -> None:
        for host, moves in (("n1", 1), ("n2", 1), ("me", 3)):
            moved = hosts[host].wait_until(partial(pauses, hosts[host], moves), "a move", 30)
            print(f"{host} moved with pauses of {moved} ms")
        for relay in relays_of(commands):
            relay.kill()

    # Nobody waits for a hole to be punched, so the chain stands on relayed connections.
    flags = ("--set", "host.punch_wait_s=0", "--log-level", "debug")
    result, logs = generate_in_three(watch, more_flags=flags)
    step_ms = 1e3 / result["timings"]["tokens_per_s"]
    print(f"a step takes {step_ms:.0f} ms")
    assert result["failovers"] == 0
    assert all(int(pause_ms) < step_ms for log in logs.values() for pause_ms in MOVED.findall(log))


def pauses(command: Command, moves: int) -> list[str] | None:
    """The milliseconds for which it sent nothing on while it moved; None before so many moves."""
    found = MOVED.findall(command.err)
    return found if len(found) >= moves else None


def relays_of(commands: Commands) -> list[Command]:
    return [command for command in commands.started if command.host.startswith("relay")]


@on_request
@pytest.mark.usefixtures("in_a_lab")
def test_three_nodes_and_a_client_behind_routers_give_the_ids_of_one_machine() -> None:
    result, _ = generate_in_three()
    assert result["failovers"] == 0


@on_request
@pytest.mark.usefixtures("in_a_lab")
def test_a_relay_that_is_killed_changes_no_token() -> None:
    def fault(commands: Commands, nodes: dict[str, Command]) -> None:
        time.sleep(1.0)
        relays_of(commands)[0].kill()

    generate_in_three(fault)


@on_request
@pytest.mark.usefixtures("in_a_lab")
@pytest.mark.parametrize("router", ["n2", "n3-router", "me"])
def test_a_router_that_drops_its_table_changes_no_token(router: str) -> None:
    def fault(commands: Commands, nodes: dict[str, Command]) -> None:
        time.sleep(1.0)
        commands.lab.flush_nat(router)

    generate_in_three(fault)


# ---------------------------------------------------------------------- a client that moves


@on_request
@pytest.mark.usefixtures("in_a_lab")
def test_a_client_that_moves_twice_in_a_text_goes_on() -> None:
    """The second time while it is still coming back from the first."""

    def fault(commands: Commands, nodes: dict[str, Command]) -> None:
        for _ in range(2):
            time.sleep(1.0)
            commands.lab.change_address("me")

    generate_in_three(fault)


@on_request
@pytest.mark.usefixtures("in_a_lab")
def test_a_client_that_sleeps_and_wakes_at_another_address_goes_on() -> None:
    """As a laptop that is closed at home and opened elsewhere."""

    def fault(commands: Commands, nodes: dict[str, Command]) -> None:
        nodes["me"].signal(signal.SIGSTOP)
        commands.lab.change_address("me")
        time.sleep(20.0)
        nodes["me"].signal(signal.SIGCONT)

    generate_in_three(fault)


@on_request
@pytest.mark.usefixtures("in_a_lab")
def test_a_client_that_moves_while_its_prompt_is_sent_goes_on() -> None:
    prompt = prompt_of(tokenizer(), 900)

    def fault(commands: Commands, nodes: dict[str, Command]) -> None:
        commands.lab.change_address("me")

    generate_in_three(fault, tokens=16, prompt=prompt)


# ---------------------------------------------------------------------- neighbours that fall silent


@on_request
@pytest.mark.usefixtures("in_a_lab")
def test_a_blackholed_neighbour_is_noticed_within_12_s_when_idle() -> None:
    with swarm_in("homes") as (commands, flags):
        node = commands.node("a", "--blocks", "0:8", *flags)
        peer_id = reachable(node)
        relay = relays_of(commands)[0]
        relay.sighting(peer_id, "direct")
        commands.lab.blackhole("a")
        silent_at = time.monotonic()
        gone = relay.sighting(peer_id, "gone", 20)
        print(f"noticed after {gone.at - silent_at:.1f} s")
        assert gone.at - silent_at < 12


@on_request
@pytest.mark.usefixtures("in_a_lab")
def test_a_blackholed_neighbour_is_noticed_within_3_s_when_a_step_waits() -> None:
    with swarm_in("homes") as (commands, flags):
        first, spare = (commands.node(host, "--blocks", "0:8", *flags) for host in ("a", "b"))
        one, other = reachable(first), reachable(spare)
        client = generate(commands, "c", 256, [[(one, "0:8")], [(other, "0:8")]], flags)
        first.event("session_opened")
        time.sleep(1.0)
        commands.lab.blackhole("a")
        silent_at = time.monotonic()
        contact = client.sighting(other, "contact", 20)
        print(f"noticed after {contact.at - silent_at:.1f} s")
        assert contact.at - silent_at < 3
        assert_greedy(client, 256)
