"""Scenarios are data, and what is wrong with one is said where it is written down."""

from __future__ import annotations

import pytest

from .plan import namespaces, wiring
from .scenario import Line, Scenario, Site
from .scenarios import KINDS, SCENARIOS, named, pair


def test_a_host_has_its_own_address_and_the_one_by_which_it_is_seen() -> None:
    home = Site("home", ("one", "two"), ("port-preserving",), ipv6=True)
    scenario = Scenario("s", "", (Site("server"), home))
    assert scenario.own_ipv4("server") == scenario.public_ipv4("server") == "11.0.1.1"
    assert (scenario.own_ipv4("two"), scenario.public_ipv4("two")) == ("192.168.1.11", "11.0.2.1")
    assert scenario.public_ipv6("two") == "2abc:0:2:1::b"
    assert scenario.prefixes(home) == (b"\x0b\x00\x02", b"\x2a\xbc\x00\x00\x00\x02")
    assert scenario.site("home-router") is scenario.site("two") is home


def test_routers_are_named_from_the_internet_inwards() -> None:
    assert Site("a").router_names == ()
    assert Site("a").edge == "a"
    double = Site("a", routers=("symmetric", "port-preserving"))
    assert double.router_names == ("a-carrier1", "a-router")
    assert double.edge == "a-carrier1"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Site("a", ("x", "y")), "exactly one host"),
        (lambda: Site("much-too-long"), "1 to 10 characters"),
        (lambda: Site("a", routers=("symmetric", "rst"), ipv6=True), "IPv6 themselves"),
        (lambda: Scenario("s", "", (Site("a"), Site("b", ("a",)))), "one name"),
        (lambda: Scenario("s", "", tuple(Site(f"n{n}") for n in range(201))), "200 sites"),
        (lambda: Line(loss=1.5), "it is a share"),
        (lambda: Line(up_mbit=0), "cannot be like this"),
        (lambda: Line(delay_ms=-1), "cannot be like this"),
    ],
)
def test_a_scenario_that_cannot_be_is_refused(make: object, why: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=why):
        make()


def test_a_name_that_no_scenario_has_gets_the_list_of_those_that_exist() -> None:
    with pytest.raises(KeyError, match=r"all-pairs.*pair:A:B"):
        named("nowhere")
    with pytest.raises(KeyError, match="its hosts: relay1"):
        SCENARIOS["all-pairs"].site("nobody")
    assert named("pair:public:UPnP") == pair("public", "UPnP")


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=str)
def test_every_host_and_router_is_made_once_and_wired(scenario: Scenario) -> None:
    made = [command.split()[3] for command in namespaces(scenario)]
    assert len(set(made)) == len(made)
    wired = "\n".join(wiring(scenario))
    for name in made:
        assert f" {name} " in wired, name


def test_kinds_translate_as_their_names_say() -> None:
    def rules(kind: str) -> str:
        scenario = Scenario("s", "", (Site("a", routers=KINDS[kind]),))
        return "\n".join(wiring(scenario))

    assert "MASQUERADE" not in rules("public")
    assert rules("port-preserving").count("MASQUERADE") == 1
    assert rules("double NAT").count("MASQUERADE") == 2
    assert "--random-fully" in rules("symmetric")
    assert "--random-fully" not in rules("RST-ing")
    assert "tcp-reset" in rules("RST-ing")
    assert "tcp-reset" not in rules("port-preserving")
