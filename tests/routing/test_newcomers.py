"""Who is untried is found out about, one of an address range at a time, in a share of the sessions."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given

from p2pinfer.errors import NoRoute
from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.score import Score
from p2pinfer.routing.address_ranges import (
    NO_RANGE,
    address_range,
    allocation_of,
    name_in,
    ranges_of,
    ranges_of_ip,
)
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.config import RoutingConfig
from p2pinfer.routing.cost import route_cost
from p2pinfer.routing.newcomers import grouped_by_range, plan_optimistically
from p2pinfer.routing.policy import RiskAdjusted, ask_policy
from p2pinfer.routing.route import Candidate, RouteRequest

from .test_planner import Scores, Swarm, every_route, swarms

REVISION = "a" * 32
REQUEST = RouteRequest(REVISION, num_blocks=8, hidden_bytes_per_token=64, tokens=100)


def candidate(
    peer_id: str,
    start: int = 0,
    stop: int = 8,
    tokens_per_s: float = 10.0,
    addrs: tuple[str, ...] = (),
    *,
    found_at: str = "",
) -> Candidate:
    said = Announcement(
        peer_id, "m", REVISION, BlockSpan(start, stop), "float32", tokens_per_s, 100, 1, addrs=addrs
    )
    return Candidate(said, found_in=ranges_of_ip(found_at) if found_at else None)


class View:
    """Everybody is proven but the newcomers, those on probation, and who failed or is banned, by its name."""

    def __init__(self, *newcomers: str, on_probation: tuple[str, ...] = ()) -> None:
        self._newcomers = newcomers
        self._on_probation = on_probation

    def score(self, peer_id: str) -> Score:
        if peer_id in self._newcomers:
            return Score(0.05, 0.8, True, Score(1.0, 1.0), is_stranger=True)
        if peer_id in self._on_probation:
            return Score(0.4, 0.9, True, Score(1.0, 1.0))
        if peer_id.startswith("failed"):
            return Score(0.4, 0.9, False, Score(0.99, 1.0))
        return Score(0.99, 0.99, at_best=Score(1.0, 1.0))

    def is_banned(self, peer_id: str) -> bool:
        return peer_id.startswith("banned")


def chosen(
    peers: list[Candidate], view: View, *, request: RouteRequest = REQUEST, times: int = 1000
) -> Counter[str]:
    """How often each peer is in the first route."""
    policy = RiskAdjusted(rng=random.Random(1), alternatives=1)
    counts: Counter[str] = Counter()
    for _ in range(times):
        counts.update(ask_policy(policy, peers, request, view)[0].peer_ids)
    return counts


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/ip4/192.0.2.77/tcp/4001", "192.0.2.0/24"),
        ("/ip4/192.0.2.9/tcp/1/p2p/Qm/p2p-circuit/p2p/12D3", "192.0.2.0/24"),
        ("/ip6/2001:db8:1:2::3/tcp/1", "2001:db8:1::/48"),
        ("/ip6/2002:c000:22d::7/tcp/1", "192.0.2.0/24"),  # 6to4: whoever has the one has the other
        ("/ip6/::ffff:192.0.2.9/tcp/1", "192.0.2.0/24"),
        ("/ip6/64:ff9b::192.0.2.9/tcp/1", "192.0.2.0/24"),  # NAT64: so all IPv4 peers look from IPv6 alone
        ("/dns4/Node.Example/tcp/1", NO_RANGE),
        ("/ip4/999.0.0.1/tcp/1", NO_RANGE),
        ("/onion3/abc:1", NO_RANGE),
    ],
)
def test_an_address_counts_as_its_range(address: str, expected: str) -> None:
    assert address_range(address) == expected


def test_an_invented_address_beside_the_true_one_gains_nothing() -> None:
    true = "/ip4/198.51.100.1/tcp/1"
    crowd = [candidate(f"s{n}", addrs=(f"/ip4/203.0.{n}.1/tcp/1", true)) for n in range(9)]
    alone = candidate("alone", addrs=("/ip4/192.0.2.1/tcp/1",))
    groups = grouped_by_range([*crowd, alone, candidate("nowhere")])
    assert {name: len(peers) for name, peers in groups.items()} == {
        "198.51.100.0/24": 9,
        "192.0.2.0/24": 1,
        NO_RANGE: 1,
    }


def test_newcomers_together_get_their_share_and_no_more() -> None:
    peers = [candidate("proven", tokens_per_s=11.0)] + [
        candidate(f"new{n}", tokens_per_s=11.5, addrs=(f"/ip4/192.0.{n}.1/tcp/1",)) for n in range(5)
    ]
    counts = chosen(peers, View(*(f"new{n}" for n in range(5))))
    assert 1 - counts["proven"] / 1000 == pytest.approx(RoutingConfig().explore_share, abs=0.03)


def test_on_probation_a_peer_is_used_in_most_sessions_and_who_failed_is_not() -> None:
    rivals = {"tried": ("tried",), "stranger": (), "failed": ()}
    shares: dict[str, float] = {}
    for name, on_probation in rivals.items():
        peers = [candidate("proven", tokens_per_s=11.0), candidate(name, tokens_per_s=11.5)]
        view = View("stranger", on_probation=on_probation)
        shares[name] = chosen(peers, view)[name] / 1000
    config = RoutingConfig()
    assert shares["tried"] == pytest.approx(config.probation_share, abs=0.05)
    assert shares["stranger"] == pytest.approx(config.explore_share, abs=0.03)
    assert shares["failed"] == pytest.approx(config.explore_share, abs=0.03)


def test_a_stranger_that_waits_does_not_keep_its_neighbour_from_its_probation() -> None:
    address = ("/ip4/203.0.113.1/tcp/1",)
    crowd = [candidate(f"s{n}", tokens_per_s=11.5, addrs=address) for n in range(20)]
    tried = candidate("tried", tokens_per_s=11.5, addrs=address)
    view = View(*(peer.peer_id for peer in crowd), on_probation=("tried",))
    counts = chosen([candidate("proven", tokens_per_s=11.0), tried, *crowd], view, times=300)
    assert counts["tried"] / 300 > RoutingConfig().probation_share - RoutingConfig().explore_share - 0.09


def test_a_range_goes_on_waiting_when_its_banned_peer_is_gone() -> None:
    new = candidate("new", tokens_per_s=50.0, addrs=("/ip4/203.0.113.1/tcp/1",))
    proven = candidate("proven", tokens_per_s=40.0)
    waiting = replace(REQUEST, spoilt_ranges=ranges_of(["/ip4/203.0.113.9/tcp/4001"]))
    assert chosen([proven, new], View("new"), times=400)["new"] > 20
    assert chosen([proven, new], View("new"), request=waiting, times=400) == {"proven": 400}


def test_a_home_network_says_nothing_where_a_peer_has_another_address() -> None:
    """192.168.1.0/24 is in every second home: a cheat in one must not keep the others waiting."""
    home = "/ip4/192.168.1.5/tcp/1"
    assert not ranges_of([home, "/ip4/127.0.0.1/tcp/1", "/ip6/fe80::1/tcp/1", "/dns4/a.example/tcp/1"])
    peers = [candidate(f"p{n}", addrs=(home, f"/ip4/192.0.{n}.1/tcp/1")) for n in range(3)]
    groups = grouped_by_range([*peers, candidate("lan", addrs=(home,))])
    assert sorted(groups) == ["192.0.0.0/24", "192.0.1.0/24", "192.0.2.0/24", "192.168.1.0/24"]


def test_a_relays_range_is_not_spoilt_by_who_is_behind_it() -> None:
    relayed = "/ip4/198.51.100.1/tcp/1/p2p/Qm/p2p-circuit"
    assert ranges_of([relayed, "/ip4/203.0.113.9/tcp/4001", "/onion3/abc:1"]) == {"203.0.113.0/24"}


def test_a_thousand_keys_on_one_line_have_one_lines_chances() -> None:
    """Each claims to be faster than the honest newcomer by up to what the other blocks take."""
    keys = [candidate(f"s{n}", 0, 4, 5.0 + n, ("/ip4/203.0.113.1/tcp/1",)) for n in range(30)]
    honest = candidate("honest", 0, 4, 20.0, ("/ip4/192.0.2.1/tcp/1",))
    names = [peer.peer_id for peer in (*keys, honest)]
    peers = [candidate("proven", 0, 4, 11.0), honest, *keys, candidate("rest", 4, 8)]
    counts = chosen(peers, View(*names), times=800)
    tried = 800 - counts["proven"]
    assert counts["honest"] == pytest.approx(tried / 2, rel=0.35)


def test_a_range_with_a_banned_peer_waits() -> None:
    address = ("/ip4/203.0.113.1/tcp/1",)
    new = candidate("new", tokens_per_s=50.0, addrs=address)
    bad = candidate("banned", addrs=address, found_at="203.0.113.7")
    proven = candidate("proven", tokens_per_s=40.0)
    assert chosen([proven, new], View("new"), times=400)["new"] > 20
    assert chosen([proven, new, bad], View("new"), times=400) == {"proven": 400}


def test_a_banned_peer_spoils_no_range_by_announcing_it() -> None:
    """Two throw-away keys with sixteen addresses each took the newcomers' share from 12 % to nothing."""
    newcomers = [
        candidate(f"new{n}", tokens_per_s=50.0, addrs=(f"/ip4/203.0.{n}.9/tcp/1",)) for n in range(32)
    ]
    addrs = [tuple(f"/ip4/203.0.{16 * j + n}.1/tcp/1" for n in range(16)) for j in range(2)]
    bad = [candidate(f"banned{j}", addrs=addrs[j], found_at="198.51.100.1") for j in range(2)]
    peers = [candidate("proven", tokens_per_s=40.0), *newcomers]
    view = View(*(f"new{n}" for n in range(32)))
    before, after = (chosen(each, view, times=100)["proven"] for each in (peers, [*peers, *bad]))
    assert before == after < 100


def test_names_are_no_starts_until_they_are_resolved_and_then_count_as_what_they_resolve_to() -> None:
    crowd = [
        candidate(f"s{n}", tokens_per_s=50.0, addrs=(f"/dns4/n{n}.example.net/tcp/1",)) for n in range(20)
    ]
    proven = candidate("proven", tokens_per_s=40.0)
    names = View(*(peer.peer_id for peer in crowd))
    assert chosen([proven, *crowd], names, times=100) == {"proven": 100}
    resolved = [replace(peer, named_in=ranges_of_ip("192.0.2.66")) for peer in crowd]
    assert list(grouped_by_range(resolved)) == ["192.0.2.0/24"]
    assert chosen([proven, *resolved], names, times=100)["proven"] < 100
    spoilt = replace(REQUEST, spoilt_ranges=ranges_of_ip("192.0.2.1"))
    assert chosen([proven, *resolved], names, request=spoilt, times=100) == {"proven": 100}


@pytest.mark.parametrize("connected", [True, False])
def test_names_of_a_private_network_are_tried(connected: bool) -> None:
    new = candidate("new", tokens_per_s=50.0, addrs=("/dns4/node-1/tcp/4001",))
    proven = candidate("proven", tokens_per_s=40.0)
    found_in, named_in = frozenset[str](), frozenset({"172.18.0.0/24"})
    new = replace(new, found_in=found_in) if connected else replace(new, named_in=named_in)
    assert chosen([proven, new], View("new"), times=400)["new"] > 20


def test_what_a_name_of_a_banned_peer_resolves_to_is_not_spoilt() -> None:
    """It is its own word, as an address is."""
    bad = candidate("banned", addrs=("/dns4/evil.example/tcp/1",))
    bad = replace(bad, named_in=ranges_of_ip("203.0.113.7"))
    new = candidate("new", tokens_per_s=50.0, addrs=("/ip4/203.0.113.1/tcp/1",))
    assert chosen([candidate("proven", tokens_per_s=40.0), new, bad], View("new"), times=400)["new"] > 20


def test_where_a_peer_was_found_counts_and_not_what_it_announces() -> None:
    clean = ("/ip4/198.51.100.1/tcp/1",)
    new = candidate("new", tokens_per_s=50.0, addrs=clean, found_at="203.0.113.9")
    proven = candidate("proven", tokens_per_s=40.0)
    waiting = replace(REQUEST, spoilt_ranges=ranges_of_ip("203.0.113.1"))
    assert chosen([proven, new], View("new"), request=waiting, times=400) == {"proven": 400}
    elsewhere = replace(REQUEST, spoilt_ranges=ranges_of(clean))
    assert chosen([proven, new], View("new"), request=elsewhere, times=400)["new"] > 20


def test_who_announces_anothers_range_takes_none_of_its_chances() -> None:
    theirs = ("/ip4/203.0.113.9/tcp/1",)
    crowd = [candidate(f"s{n}", tokens_per_s=45.0, addrs=theirs) for n in range(40)]
    honest = candidate("honest", tokens_per_s=50.0, addrs=theirs, found_at="203.0.113.9")
    proven = candidate("proven", tokens_per_s=40.0)
    alone = chosen([proven, honest], View("honest"), times=400)["honest"]
    names = View("honest", *(peer.peer_id for peer in crowd))
    assert chosen([proven, honest, *crowd], names, times=400)["honest"] > alone / 2 > 12


def test_a_clean_address_beside_one_in_a_spoilt_range_gains_nothing() -> None:
    addrs = ("/ip4/9.9.9.9/tcp/1", "/ip4/203.0.113.1/tcp/1")
    new = candidate("new", tokens_per_s=50.0, addrs=addrs)
    waiting = replace(REQUEST, spoilt_ranges=ranges_of_ip("203.0.113.7"))
    proven = candidate("proven", tokens_per_s=40.0)
    assert chosen([proven, new], View("new"), request=waiting, times=400) == {"proven": 400}


@pytest.mark.parametrize(
    ("address", "most"),
    [
        ("/ip4/192.0.2.66/tcp/40{0:02}", 1),
        ("/dns4/n{0}.example.net/tcp/1", 0),
        ("/ip6/2001:db8:7:1::{0:x}/tcp/1", 1),  # of one /64
        ("/ip6/2001:db8:7:{0:x}00::1/tcp/1", 1),  # the /56 of a /48
        ("/ip6/2001:db8:{0:x}::1/tcp/1", 2),  # the /48 of a /32
    ],
    ids=["one IPv4 address", "names", "a /64", "a /48", "a /32"],
)
def test_twenty_keys_of_one_customer_have_one_start(address: str, most: int) -> None:
    """And who has an allocation of many customers' size has two."""
    now, lied = 1e9, 0
    ledger, policy = Ledger(vouched=["proven"]), RiskAdjusted(rng=random.Random(2))
    peers = [candidate("proven", tokens_per_s=100.0)]
    peers += [candidate(f"s{n}", tokens_per_s=130.0, addrs=(address.format(n),)) for n in range(20)]
    for _ in range(100):
        request = replace(REQUEST, spoilt_ranges=ledger.spoilt_ranges(now))
        [hop] = ask_policy(policy, peers, request, ledger)[0].peer_ids
        if hop != "proven":
            lied += 1
            ledger.ban(hop, "its audits", now)
            ledger.note_ranges(hop, ranges_of([address.format(int(hop[1:]))]), now)
    assert lied == most


def test_customers_of_one_provider_take_turns() -> None:
    peers = [candidate(f"s{n}", found_at=f"2001:db8:{n:x}::1") for n in range(9)]
    assert list(grouped_by_range(peers)) == ["2001:db8::/32"]
    assert (
        allocation_of("2001:db8:7::/48") == "2001:db8::/32"
        and allocation_of("192.0.2.0/24") == "192.0.2.0/24"
    )


def test_a_name_is_found_in_a_peers_own_addresses_only() -> None:
    assert name_in("/dns4/Node.Example/tcp/1") == "node.example"
    assert name_in("/ip4/192.0.2.1/tcp/1") == ""
    assert name_in("/dns4/relay.example/tcp/1/p2p/Qm/p2p-circuit") == ""


@pytest.mark.parametrize(
    ("newcomer", "request_"),
    [
        (candidate("new", tokens_per_s=11.0), REQUEST),
        (candidate("new", tokens_per_s=50.0), replace(REQUEST, span=BlockSpan(0, 8))),
        (candidate("new", tokens_per_s=50.0), replace(REQUEST, min_integrity=0.5)),
        (candidate("new", tokens_per_s=50.0), replace(REQUEST, excluded=frozenset({"new"}))),
        (candidate("banned", tokens_per_s=50.0), REQUEST),
    ],
)
def test_nobody_is_tried_who_is_slower_or_not_wanted_nor_in_a_failover(
    newcomer: Candidate, request_: RouteRequest
) -> None:
    proven = candidate("proven", tokens_per_s=12.0)
    if newcomer.announcement.tokens_per_s == 50.0:  # which would be worth its risk
        proven = candidate("proven", tokens_per_s=40.0)
    counts = chosen([proven, newcomer], View("new"), request=request_, times=300)
    assert counts == {"proven": 300}


def test_newcomers_that_must_wait_are_used_where_nobody_else_is() -> None:
    address = ("/ip4/203.0.113.1/tcp/1",)
    peers = [candidate("a", 0, 4, addrs=address), candidate("b", 4, 8, addrs=address)]
    with pytest.raises(NoRoute):
        plan_optimistically(peers, REQUEST, View("a", "b"), RoutingConfig(), random.Random(1))
    assert chosen(peers, View("a", "b"), times=50) == {"a": 50, "b": 50}


@given(swarms(max_peers=4, max_blocks=4))
def test_a_try_is_the_cheapest_route_if_all_are_at_their_best(swarm: Swarm) -> None:
    """Equal to brute force under the optimistic scores, when nobody has to wait."""
    config = RoutingConfig()
    best = Scores({peer_id: Score(1.0, 1.0) for peer_id in swarm.view.by_peer}, swarm.view.banned)
    doubtful = Scores(
        {peer_id: replace(s, at_best=Score(1.0, 1.0)) for peer_id, s in swarm.view.by_peer.items()},
        swarm.view.banned,
    )
    costs = [route_cost(each, swarm.candidates, swarm.request, best) for each in every_route(swarm)]
    if not costs:
        return
    found = plan_optimistically(swarm.candidates, swarm.request, doubtful, config, random.Random(1))
    assert route_cost(found, swarm.candidates, swarm.request, best) == pytest.approx(min(costs))


def test_a_ledger_says_who_is_a_newcomer() -> None:
    ledger = Ledger(vouched=["proven"])
    policy = RiskAdjusted(RoutingConfig(explore_share=1.0), rng=random.Random(1))
    peers = [candidate("proven", tokens_per_s=10.0), candidate("new", tokens_per_s=10.5)]
    routes = ask_policy(policy, peers, REQUEST, ledger)
    assert [route.peer_ids for route in routes] == [("new",), ("proven",)]
