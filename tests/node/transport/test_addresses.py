"""Multiaddrs: which are understood, which can be listened on, which are told to others."""

from __future__ import annotations

import errno
import re
import socket
from typing import NamedTuple

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import AddressUnusable, ConfigError
from p2pinfer.node.transport import addresses
from p2pinfer.node.transport.addresses import (
    advertised,
    check_announced,
    check_listen,
    line_of,
    machine_addresses,
    parse_circuit,
    parse_tcp,
    range_of,
    range_of_connection,
    split_peer,
    with_plain_ids,
)
from p2pinfer.node.transport.identity import new_identity

PEER = "12D3KooWBny6jbU4SmjVmbw5qgDyZWFvgdKTmkeM2G2zPUvZoHwr"


class NetworkAddress(NamedTuple):
    family: int
    address: str


class Stats(NamedTuple):
    isup: bool


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("/ip4/192.0.2.1/tcp/4001", ("ip4", "192.0.2.1", 4001, "")),
        (f"/ip6/2001:db8::1/tcp/0/p2p/{PEER}", ("ip6", "2001:db8::1", 0, PEER)),
        (f"/dns4/swarm.example/tcp/4001/p2p/{PEER}/", ("dns4", "swarm.example", 4001, PEER)),
    ],
)
def test_tcp_addresses_are_understood(address: str, parsed: tuple[str, str, int, str]) -> None:
    assert parse_tcp(address) == parsed


@pytest.mark.parametrize(
    "address",
    [
        "",
        "192.0.2.1:4001",
        "/ip4/192.0.2.1",
        "/ip4/192.0.2.1/udp/4001/quic-v1",
        "/ip4/192.0.2.256/tcp/1",
        "/ip4/::1/tcp/1",
        "/ip6/192.0.2.1/tcp/1",
        "/ip4/192.0.2.1/tcp/65536",
        "/ip4/192.0.2.1/tcp/1/ws",
        "/ip4/192.0.2.1/tcp/1/p2p/nobody",
        "/ip4/192.0.2.1/tcp/1 ",
        "/ip4/192.0.2.1/tcp/1\n",
    ],
)
def test_anything_else_is_not(address: str) -> None:
    with pytest.raises(ValueError):
        parse_tcp(address)


@given(st.text(max_size=100) | st.from_regex(r"/ip[46]/[0-9a-f.:]{1,40}/tcp/\d{1,9}(/p2p/\w{1,60})?"))
def test_garbage_is_a_value_error(address: str) -> None:
    try:
        _, host, port, _ = parse_tcp(address)
        assert host
        assert 0 <= port <= 65535
    except ValueError:
        pass


def test_an_address_is_split_from_its_peer() -> None:
    assert split_peer(f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}") == ("/ip4/192.0.2.1/tcp/1", PEER)
    with pytest.raises(ValueError, match="does not end in /p2p/"):
        split_peer("/ip4/192.0.2.1/tcp/1")


# Of one key, in base58 and as a CIDv1 in base32 and base36.
KEY = "12D3KooWEfY2TmhEWp1scTkNTgGcB6sBdaeicFJXJjeBmUpFMyg8"
AS_CIDS = (
    "bafzaajaiaejcasahljmx44q2cvxc4b4z3zombrjsjxdop2xrzxkgeuegr3ctefo5",
    "k51qzi5uqu5dhz7ufdgtp0j2w5gyihk9jymlithlod0zxrq5wihaz2eap1pq71",
)


@pytest.mark.parametrize("name", AS_CIDS)
def test_ids_that_people_have_as_cids_are_read(name: str) -> None:
    """In the place of the peer and of the relay."""
    place = "/ip4/192.0.2.1/tcp/1"
    assert split_peer(with_plain_ids(f"{place}/p2p/{name}")) == (place, KEY)
    through = with_plain_ids(f"{place}/p2p/{name}/p2p-circuit/p2p/{name}")
    assert parse_circuit(through) == (f"{place}/p2p/{KEY}", KEY, KEY)


@pytest.mark.parametrize(
    "address",
    [
        f"/ip4/192.0.2.1/tcp/1/p2p/{KEY}",
        "/ip4/192.0.2.1/tcp/1",
        f"/ip4/192.0.2.1/tcp/1/p2p/{AS_CIDS[0][:-1]}",
        f"/ip4/192.0.2.1/tcp/1/p2p/{AS_CIDS[0].upper()}",
        # The CID of a file.
        "/ip4/192.0.2.1/tcp/1/p2p/bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi",
    ],
)
def test_what_names_no_key_as_a_cid_stays_as_it_is(address: str) -> None:
    assert with_plain_ids(address) == address


@given(st.from_regex(r"/p2p/[a-z][a-zA-Z0-9]{40,80}"))
def test_garbage_in_the_place_of_an_id_is_no_error(address: str) -> None:
    assert "/p2p/" in with_plain_ids(address)


@pytest.mark.parametrize(
    ("number", "why"), [(errno.EACCES, "special rights"), (errno.EAFNOSUPPORT, "not supported")]
)
def test_why_an_address_cannot_be_had_is_said(number: int, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "Address family not supported")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(AddressUnusable, match=why):
        check_listen(["/ip6/::1/tcp/80"])


def test_a_wildcard_is_told_as_this_machines_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def outward(_: object) -> str:
        return "192.168.1.7"

    def interfaces() -> dict[str, list[NetworkAddress]]:
        return {
            "lo": [NetworkAddress(socket.AF_INET, "127.0.0.1"), NetworkAddress(socket.AF_INET6, "::1")],
            "docker0": [NetworkAddress(socket.AF_INET, "172.17.0.1")],
            "eth0": [
                NetworkAddress(socket.AF_INET, "192.168.1.7"),
                NetworkAddress(socket.AF_INET, "198.51.100.7"),
                NetworkAddress(socket.AF_INET6, "fe80::1%eth0"),
            ],
            "down0": [NetworkAddress(socket.AF_INET, "10.0.0.1")],
        }

    def states() -> dict[str, Stats]:
        return {"lo": Stats(True), "eth0": Stats(True), "docker0": Stats(True), "down0": Stats(False)}

    monkeypatch.setattr(addresses, "_outward_address", outward)
    monkeypatch.setattr(psutil, "net_if_addrs", interfaces)
    monkeypatch.setattr(psutil, "net_if_stats", states)
    assert machine_addresses("ip6") == ["::1"]
    found = machine_addresses("ip4")
    assert found[0] == "192.168.1.7"
    assert set(found) == {"192.168.1.7", "198.51.100.7", "172.17.0.1"}
    assert advertised(["/ip4/0.0.0.0/tcp/4001", "/ip4/127.0.0.1/tcp/4002", "/ip4/192.168.1.7/tcp/4001"]) == [
        *(f"/ip4/{ip}/tcp/4001" for ip in found),
        "/ip4/127.0.0.1/tcp/4002",
    ]


def test_a_machine_without_a_network_tells_its_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    assert machine_addresses("ip4") == ["127.0.0.1"]


def test_no_way_out_is_no_outward_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert machine_addresses("ip4")


def test_addresses_to_be_announced_are_told_without_the_peer() -> None:
    own = new_identity().peer_id
    given = [
        "/ip4/203.0.113.7/tcp/14001",
        f"/ip4/203.0.113.7/tcp/14001/p2p/{own}",
        "/dns4/node.example.org/tcp/4001",
        "/dns6/node.example.org./tcp/4001",
        "/ip6/2001:db8::7/tcp/4001",
    ]
    assert check_announced(given, own) == (given[0], *given[2:])
    assert check_announced([], own) == ()


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("/ip4/0.0.0.0/tcp/4001", "0.0.0.0 is not an address that peers can dial"),
        ("/ip6/::/tcp/4001", ":: is not an address that peers can dial"),
        ("/ip4/224.0.0.1/tcp/4001", "224.0.0.1 is not an address"),
        ("/ip4/255.255.255.255/tcp/4001", "is not an address"),
        ("/ip4/203.0.113.7/tcp/0", "nobody can dial port 0"),
        ("/ip4/203.0.113.7/udp/4001", "write for example /ip4/"),
        ("/ip4/203.0.113.300/tcp/4001", "write for example"),
        ("/ip4/203.0.113.7/tcp/70000", "port above 65535"),
        ("203.0.113.7:4001", "write for example"),
        ("/dns4/-bad-.org/tcp/4001", "is not a host name"),
        ("/dns4/bad..org/tcp/4001", "is not a host name"),
        pytest.param(
            f"/ip4/203.0.113.7/tcp/4001/p2p/{new_identity().peer_id}",
            "another peer's id",
            id="another peer's id",
        ),
    ],
)
def test_what_nobody_could_dial_is_not_announced(address: str, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        check_announced([address], new_identity().peer_id)


@pytest.mark.parametrize(
    "ip, line, address_range",
    [
        ("192.0.2.77", "192.0.2.77/32", "192.0.2.0/24"),
        ("::ffff:192.0.2.77", "192.0.2.77/32", "192.0.2.0/24"),
        ("2001:db8:1:2ff:a::1", "2001:db8:1:200::/56", "2001:db8:1::/48"),
        ("fe80::1%eth0", "fe80::/56", "fe80::/48"),
    ],
)
def test_addresses_of_one_line_count_together(ip: str, line: str, address_range: str) -> None:
    assert (line_of(ip), range_of(ip)) == (line, address_range)


def test_a_connection_counts_for_its_address_or_for_its_relay() -> None:
    assert range_of_connection(("198.51.100.9", 4001), ()) == "198.51.100.0/24"
    circuits = [f"/p2p/{PEER}/p2p-circuit", f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}/p2p-circuit"]
    assert {range_of_connection(None, [each]) for each in circuits} == {f"relay {PEER}"}
