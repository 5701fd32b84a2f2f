"""What a node's events and a generation's bill look like."""

from __future__ import annotations

import pytest
from rich.console import Console

from p2pinfer.audit.auditor import AuditTally
from p2pinfer.cli.output.plain import short_peer
from p2pinfer.cli.output.render import describe_event, route_table
from p2pinfer.generation.generation import GenerationResult, Timings
from p2pinfer.generation.remote_blocks import HopUsed
from p2pinfer.models.span import BlockSpan
from p2pinfer.node import events
from p2pinfer.reputation.ledger import Ledger

PEER = "12D3KooWHRDh3yL8gix9dCiwmrLZahcKY8Ae7ovYj3Tb1iAg6gpz"
ADDRS = ("/ip4/192.0.2.1/tcp/1/p2p/12D3",)


def test_a_short_peer_keeps_the_end_that_tells_it_apart() -> None:
    assert short_peer(PEER) == "12D3..Ag6gpz"
    assert short_peer("short") == "short"


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (events.Starting(PEER, ADDRS, "m", "r"), f"this node is {PEER}"),
        (events.Loading((0, 4), "asked for"), "loading blocks 0:4 (asked for)"),
        (
            events.Ready(
                *(PEER, ADDRS, "m", "r", (0, 4), "bfloat16", "cpu", 210.4, 131072),
                cache_bytes=2 << 30,
                weights_bytes=13_500_000,
                relay_bytes_per_s=1e6,
            ),
            "serving blocks 0:4 of m: bfloat16 on cpu, 210 tok/s\n"
            "          memory: 13.5 MB for weights, up to 2.1 GB for a KV cache of 131,072 tokens\n"
            "          relays up to 1.0 MB/s for peers behind routers, if publicly reachable "
            "(--relay-rate)\n"
            "          others join with\n"
            "          --bootstrap /ip4/192.0.2.1/tcp/1/p2p/12D3",
        ),
        (
            events.Ready(PEER, ADDRS, "", "", None, "", "", 0.0, 0),
            "introducing peers to each other, without blocks\n"
            "          relaying is off (--relay-rate)\n"
            "          others join with\n"
            "          --bootstrap /ip4/192.0.2.1/tcp/1/p2p/12D3",
        ),
        (
            events.SessionOpened(PEER, (0, 4), 1024, 2),
            "12D3..Ag6gpz opened a session for up to 1,024 tokens; 2 open",
        ),
        (
            events.SessionClosed(PEER, 1000, "done", 1),
            "session of 12D3..Ag6gpz closed after 1,000 tokens (done); 1 open",
        ),
        (events.SessionRefused(PEER, "busy", "too much"), "refused a session of 12D3..Ag6gpz: too much"),
        (
            events.SessionClosed(PEER, 1, "\x1b[31mevil\n", 0),
            r"session of 12D3..Ag6gpz closed after 1 tokens (\x1b[31mevil); 0 open",
        ),
        (
            events.SessionRefused(PEER, "busy", "\x1b[31mevil\n"),
            r"refused a session of 12D3..Ag6gpz: \x1b[31mevil",
        ),
        (
            events.Verified(4, 2, 1, 0),
            "audited other peers: 4 hops audited: 2 passed, 1 failed, 1 inconclusive",
        ),
        (
            events.Joined(3, (ADDRS[0],), (("/ip4/192.0.2.9/tcp/1/p2p/12D4", "Connection\nrefused"),)),
            "connected to 3 peers; 1 of 2 bootstrap peers answered\n"
            "          answered: /ip4/192.0.2.1/tcp/1/p2p/12D3\n"
            "          did not answer: /ip4/192.0.2.9/tcp/1/p2p/12D4 (Connection refused)",
        ),
        (events.Joined(1, (), ()), "connected to 1 peer"),
        (
            events.Joined(0, (), ()),
            "connected to 0 peers: no bootstrap peer is given, and none was found on the local network; "
            "others can join this node",
        ),
        (
            events.Stopped(8040.0, 1, 34567, 2, 999, 100_000, 1_200_000, 3),
            "stopped after 2 h 14 min: 1 session, 2 refused, 34,567 tokens computed, 999 B sent, "
            "100 kB received, 1.2 MB relayed for others, audited 3 times",
        ),
        (
            events.Stopped(4 * 86400.0 + 7200, 0, 0, 0, 0, 0, 0, 1),
            "stopped after 4 days 2 h: 0 sessions, 0 refused, 0 tokens computed, 0 B sent, 0 B received, "
            "0 B relayed for others, audited 1 time",
        ),
        (events.NodeLeaving(0), "left the swarm"),
    ],
)
def test_every_event_has_its_line(event: events.Event, line: str) -> None:
    assert describe_event(event) == line


def shown(result: GenerationResult, audits: AuditTally | None = None) -> str:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(route_table(result, Ledger(), audits or AuditTally()))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def result(timings: Timings, failovers: int) -> GenerationResult:
    route = (HopUsed(PEER, BlockSpan(0, 4), "direct"), HopUsed("other", BlockSpan(4, 8), "relayed"))
    return GenerationResult("text", (1, 2, 3), 5, "length", route, timings, failovers)


def test_the_bill_lists_the_hops_and_the_network() -> None:
    assert shown(result(Timings(0.25, 40.0, (4.5, 3.25), 10.0), failovers=0)) == (
        "hop           blocks  connection  ms/token  integrity  reliability\n"
        "12D3..Ag6gpz  0:4     direct          4.50       0.05         0.95\n"
        "other         4:8     relayed         3.25       0.05         0.95\n"
        "network                               2.25\n"
        "3 tokens generated from a prompt of 5: 40.0 tok/s, first token after 250 ms\n"
        "no hop was audited"
    )


def test_the_bill_says_what_was_to_be_expected() -> None:
    told = shown(result(Timings(0.25, 40.0, (4.5, 3.25), 10.0, 43.26), failovers=0))
    assert (
        "\n3 tokens generated from a prompt of 5: 40.0 tok/s (expected: 43.3), first token after 250 ms\n"
        in told
    )


def test_the_bill_says_what_was_checked() -> None:
    timings = Timings(0.1, 1.0, (), 0.0)
    one = shown(result(timings, failovers=0), AuditTally(done=1, passed=1))
    assert one.endswith("\n1 hop audited: 1 passed")
    all_sorts = AuditTally(done=10, passed=4, failed=3, suspect=2, inconclusive=1)
    told = "\n10 hops audited: 4 passed, 3 failed, 2 suspect, 1 inconclusive"
    assert shown(result(timings, failovers=0), all_sorts).endswith(told)


def test_the_bill_of_a_single_token_has_no_times_per_hop() -> None:
    assert shown(result(Timings(0.25, 0.0, (), 0.0), failovers=2)) == (
        "hop           blocks  connection  ms/token  integrity  reliability\n"
        "12D3..Ag6gpz  0:4     direct             -       0.05         0.95\n"
        "other         4:8     relayed            -       0.05         0.95\n"
        "3 tokens generated from a prompt of 5: 0.0 tok/s, first token after 250 ms; 2 failovers\n"
        "no hop was audited"
    )


def test_one_failover_is_singular() -> None:
    assert shown(result(Timings(0.1, 1.0, (), 0.0), failovers=1)).endswith("; 1 failover\nno hop was audited")
