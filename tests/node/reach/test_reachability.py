"""What observations of peers add up to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.node.reach.reachability import (
    Observation,
    Reachability,
    classify,
    describe,
    is_global,
    is_refuted,
    with_announced,
)

OWN = {"11.0.0.7", "2abc::7", "192.168.1.10"}


def seen(
    ip: str = "11.0.0.1", port: int = 4001, local: int | None = 4001, reached: tuple[int, ...] = ()
) -> Observation:
    return Observation(f"peer-{ip}-{port}-{local}-{reached}", ip, port, local, reached)


def test_nobody_has_looked() -> None:
    assert classify([], OWN) == Reachability()


def test_what_the_local_network_sees_does_not_count() -> None:
    assert classify([seen("192.168.1.10", reached=(4001,)), seen("127.0.0.1")], OWN) == Reachability()


def test_an_own_address_that_can_be_dialled_is_public() -> None:
    found = classify([seen("11.0.0.7", reached=(4001,))], OWN)
    assert (found.kind, found.nat, found.addrs) == ("public", "none", ("/ip4/11.0.0.7/tcp/4001",))


def test_an_own_address_that_cannot_is_behind_a_firewall() -> None:
    found = classify([seen("11.0.0.7")], OWN)
    assert (found.kind, found.nat, found.addrs) == ("private", "firewall", ())


def test_a_routers_address_that_can_be_dialled_is_mapped() -> None:
    found = classify([seen(port=50_000, local=50_001, reached=(4001,))], OWN)
    assert (found.kind, found.addrs) == ("mapped", ("/ip4/11.0.0.1/tcp/4001",))


@pytest.mark.parametrize(
    ("observations", "nat"),
    [
        ([seen(port=4001, local=4001), seen(port=4002, local=4002)], "port-preserving"),
        ([seen(port=4001, local=4001), seen(port=61_000, local=4002)], "symmetric"),
        ([seen(port=61_000, local=4002)], "symmetric"),
        ([seen(local=None)], "unknown"),
    ],
)
def test_ports_tell_the_kind_of_router(observations: list[Observation], nat: str) -> None:
    found = classify(observations, OWN)
    assert (found.kind, found.nat, found.outside_ips) == ("private", nat, ("11.0.0.1",))


def test_one_who_claims_to_have_reached_us_does_not_outweigh_two_who_could_not() -> None:
    assert (
        classify([seen(reached=(4001,)), seen(port=1, local=1), seen(port=2, local=2)], OWN).kind == "private"
    )


def test_ipv4_decides_and_ipv6_addresses_are_kept() -> None:
    found = classify([seen(), seen("2abc::7", reached=(4002,))], OWN)
    assert (found.kind, found.nat) == ("private", "port-preserving")
    assert found.outside_ips == ("11.0.0.1", "2abc::7")
    assert found.addrs == ("/ip6/2abc::7/tcp/4002",)
    assert classify([seen("2abc::7", reached=(4002,))], OWN).kind == "public"


@given(
    st.lists(
        st.builds(
            Observation,
            st.text(max_size=3),
            st.sampled_from(["11.0.0.1", "11.0.0.7", "2abc::7", "10.0.0.1", "nonsense"]),
            st.integers(1, 65535),
            st.none() | st.integers(1, 65535),
            st.lists(st.integers(1, 65535), max_size=2).map(tuple),
        )
    )
)
def test_whatever_peers_say_there_is_one_line_about_it(observations: list[Observation]) -> None:
    found = classify(observations, OWN)
    assert "\n" not in describe(found)
    assert (found.kind in ("public", "mapped")) <= bool(found.addrs)
    assert (found.kind == "unknown") == (not found.observers)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Reachability("public", "none", ("11.0.0.7",), ("/ip4/11.0.0.7/tcp/1",)), "reachable from"),
        (
            Reachability("mapped", "symmetric", ("11.0.0.1",), ("/ip4/11.0.0.1/tcp/1",)),
            "port of the router's",
        ),
        (Reachability("private", "firewall", ("11.0.0.7",)), "firewall"),
        (Reachability("private", "port-preserving", ("11.0.0.1",)), "hole punching"),
        (Reachability("private", "symmetric", ("11.0.0.1",)), "by relays"),
        (Reachability("private", "unknown", ("11.0.0.1",)), "behind a router"),
        (Reachability(), "not seen"),
    ],
)
def test_the_line_says_what_matters(found: Reachability, said: str) -> None:
    assert said in describe(found)


def test_addresses_that_mean_something_everywhere() -> None:
    assert is_global("11.0.0.1")
    assert is_global("2abc::1")
    assert not any(map(is_global, ["192.168.1.1", "100.64.0.1", "127.0.0.1", "::1", "fe80::1", "", "x"]))


FORWARDED = "/ip4/11.0.0.1/tcp/14001"


def test_an_announced_address_counts_until_somebody_has_looked() -> None:
    promised = with_announced(Reachability(), [FORWARDED, "/dns4/example.org/tcp/4001"])
    assert (promised.kind, promised.promised) == ("mapped", True)
    assert promised.addrs == (FORWARDED, "/dns4/example.org/tcp/4001")
    assert describe(promised) == f"announced at {FORWARDED}, which no peer outside has confirmed"
    assert with_announced(Reachability(), ["/ip4/192.168.1.7/tcp/4001"]) == Reachability()
    assert with_announced(Reachability(), []) == Reachability()


def test_an_announced_port_that_answers_is_as_good_as_any_other() -> None:
    found = classify([seen(port=50_000, local=50_001, reached=(14001,))], OWN)
    assert with_announced(found, [FORWARDED]) == found
    assert (found.kind, found.addrs, found.promised) == ("mapped", (FORWARDED,), False)


def test_an_announced_port_that_does_not_answer_where_peers_looked_is_refuted() -> None:
    found = classify([seen(port=50_000, local=50_001)], OWN)
    assert with_announced(found, [FORWARDED]) == found
    assert is_refuted(found, [FORWARDED])
    assert found.kind == "private"


@pytest.mark.parametrize("announced", ["/ip4/12.0.0.9/tcp/4001", "/dns6/example.org/tcp/4001"])
def test_what_observers_cannot_look_at_is_left_to_the_operator(announced: str) -> None:
    found = classify([seen(port=50_000, local=50_001)], OWN)
    promised = with_announced(found, [announced])
    assert (promised.kind, promised.addrs) == ("mapped", (announced,))
    assert promised.outside_ips == found.outside_ips
    assert not is_refuted(found, [announced])
