"""Where a stranger's word may have a host dial, and how often."""

from __future__ import annotations

import ipaddress
from itertools import pairwise

import pytest
import trio
import trio.testing
from libp2p.transport.exceptions import OpenConnectionError

from p2pinfer.errors import NotDialled, PeerUnreachable
from p2pinfer.node.host.home_networks import HomeNetworks
from p2pinfer.node.host.stranger_dials import FIRST_PAUSE_S, MAX_CIRCUITS, MAX_DIRECT, StrangerDials
from p2pinfer.node.transport.identity import new_identity

HOME = ipaddress.ip_network("192.168.1.0/24")
PEER, RELAY = new_identity().peer_id, new_identity().peer_id


class Victim:
    """Somebody at whom nobody is found, and when it was dialled."""

    def __init__(self, dials: StrangerDials) -> None:
        self.dials = dials
        self.dialled: list[tuple[str, float]] = []

    async def dial_tcp(self, address: str) -> None:
        self.dialled.append((address, trio.current_time()))
        await trio.sleep(0.05)
        raise PeerUnreachable("connection refused")

    async def dial(self, peer_id: str, address: str) -> bool:
        """True if it was dialled, in vain."""
        try:
            await self.dials.dial(peer_id, address, self.dial_tcp, hearsay=True)
        except NotDialled:
            return False
        except PeerUnreachable:
            return True
        raise AssertionError("somebody was found")


@pytest.fixture
def dials() -> StrangerDials:
    """Of a host behind a home router."""
    return StrangerDials(HomeNetworks(lambda: [HOME]))


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/10.0.0.7/tcp/80",
        "/ip4/192.168.2.1/tcp/80",
        "/ip4/127.0.0.1/tcp/80",
        "/ip4/169.254.169.254/tcp/80",
        "/ip4/224.0.0.1/tcp/80",
        "/ip4/0.0.0.0/tcp/80",
        "/ip4/100.64.0.1/tcp/80",
        "/ip4/240.0.0.1/tcp/80",
        "/ip6/::1/tcp/80",
        "/ip6/fe80::1/tcp/80",
        "/ip6/fd00::1/tcp/80",
        "/ip6/ff02::1/tcp/80",
        "/ip6/::ffff:10.0.0.7/tcp/80",
        "/ip6/2002:a00:7::1/tcp/80",
        "/ip6/64:ff9b::a00:7/tcp/80",
    ],
)
async def test_no_other_network_is_dialled_on_hearsay(address: str, dials: StrangerDials) -> None:
    victim = Victim(dials)
    chosen, refused = dials.choose(PEER, [address])
    assert chosen == []
    assert "not in that network" in str(refused[address])
    assert not await victim.dial(PEER, address)
    assert victim.dialled == []


async def test_a_name_is_no_way_around_that(dials: StrangerDials) -> None:
    victim = Victim(dials)
    assert dials.choose(PEER, ["/dns4/localhost/tcp/80"])[0] != []  # it is not known yet where that leads
    assert not await victim.dial(PEER, "/dns4/localhost/tcp/80")
    assert victim.dialled == []


async def test_the_networks_that_the_host_is_in_are_dialled(dials: StrangerDials) -> None:
    addrs = ["/ip4/192.168.1.7/tcp/80", "/ip4/11.0.0.1/tcp/80", "/ip6/2a00::1/tcp/80"]
    assert dials.choose(PEER, addrs) == (addrs, {})
    dials.note_own(["/ip4/127.0.0.1/tcp/4001"])
    assert dials.choose(PEER, ["/ip4/127.0.0.1/tcp/80"])[0] == ["/ip4/127.0.0.1/tcp/80"]


async def test_so_is_a_network_where_the_operator_says_that_the_swarm_is(dials: StrangerDials) -> None:
    """As from a container, whose own network is another one."""
    lan = ["/ip4/192.168.7.20/tcp/80"]
    assert dials.choose(PEER, lan)[0] == []

    async def answer(address: str) -> None:
        await trio.lowlevel.checkpoint()

    await dials.dial(RELAY, "/ip4/192.168.7.10/tcp/4001", answer, hearsay=False)
    assert dials.choose(PEER, lan)[0] == lan
    assert dials.choose(PEER, ["/ip4/10.0.0.7/tcp/80"])[0] == []


async def test_so_is_a_network_that_peers_come_from(dials: StrangerDials) -> None:
    dials.note_seen(("10.1.2.3", 4001))
    assert dials.choose(PEER, ["/ip4/10.1.2.7/tcp/80"])[0] != []
    assert dials.choose(PEER, ["/ip4/10.1.3.7/tcp/80"])[0] == []


async def test_only_a_few_addresses_of_one_peer_are_dialled(dials: StrangerDials) -> None:
    addrs = [f"/ip4/11.0.{n}.1/tcp/80" for n in range(16)]
    relayed = [f"{address}/p2p/{RELAY}/p2p-circuit" for address in addrs]
    chosen, refused = dials.choose(PEER, [*addrs, *relayed])
    assert chosen == [*addrs[:MAX_DIRECT], *relayed[:MAX_CIRCUITS]]
    assert len(refused) == len(addrs) + len(relayed) - len(chosen)


async def test_a_victim_is_dialled_ever_more_rarely_whoever_names_it(
    dials: StrangerDials, autojump_clock: trio.testing.MockClock
) -> None:
    """A thousand peers that were invented at one host's ports, for ten minutes."""
    victim = Victim(dials)
    for n in range(6000):
        await victim.dial(f"peer {n}", f"/ip4/11.0.0.1/tcp/{n % 1000 + 1}")
        await trio.sleep(0.1)
    times = [at for _, at in victim.dialled]
    pauses = [later - sooner for sooner, later in pairwise(times)]
    assert min(pauses) >= FIRST_PAUSE_S
    assert all(later > 1.8 * sooner for sooner, later in pairwise(pauses))
    assert len(times) < 10


async def test_dials_of_one_host_at_once_are_one_after_the_other(
    dials: StrangerDials, autojump_clock: trio.testing.MockClock
) -> None:
    victim = Victim(dials)
    async with trio.open_nursery() as nursery:
        for n in range(100):
            nursery.start_soon(victim.dial, f"peer {n}", f"/ip4/11.0.0.1/tcp/{n + 1}")
    assert len(victim.dialled) == 1


async def test_a_network_is_no_victim_either(
    dials: StrangerDials, autojump_clock: trio.testing.MockClock
) -> None:
    """Each of its hosts once, but not all within a minute."""
    victim = Victim(dials)
    began_at = trio.current_time()
    while trio.current_time() < began_at + 60:
        for n in range(256):
            await victim.dial(f"peer {n}", f"/ip4/11.0.0.{n}/tcp/80")
        await trio.sleep(1)
    assert len(victim.dialled) <= 60


async def test_one_teller_and_all_together_have_a_budget(
    dials: StrangerDials, autojump_clock: trio.testing.MockClock
) -> None:
    victim = Victim(dials)
    dials.teller = lambda peer_id: peer_id.split()[0]
    async with trio.open_nursery() as nursery:
        for n in range(1000):
            nursery.start_soon(victim.dial, f"evil {n}", f"/ip4/11.{n // 250}.{n % 250}.1/tcp/80")
    of_evil = len(victim.dialled)
    assert of_evil < 200
    assert await victim.dial("honest", "/ip4/12.0.0.1/tcp/80")  # another teller's
    async with trio.open_nursery() as nursery:
        for n in range(1000):
            nursery.start_soon(victim.dial, f"teller{n} x", f"/ip4/13.{n // 250}.{n % 250}.1/tcp/80")
    assert len(victim.dialled) < 300


async def test_peers_that_are_found_cost_nothing_and_clear_their_address(
    dials: StrangerDials, autojump_clock: trio.testing.MockClock
) -> None:
    victim, found = Victim(dials), 0

    async def answer(address: str) -> None:
        nonlocal found
        await trio.sleep(0.05)
        found += 1

    assert await victim.dial("gone", "/ip4/11.0.0.1/tcp/1")
    await trio.sleep(FIRST_PAUSE_S)
    for n in range(2000):
        await dials.dial(f"peer {n}", f"/ip4/11.0.0.1/tcp/{n + 1}", answer, hearsay=True)
    assert found == 2000
    assert dials.is_proved("peer 7", "11.0.0.1", 8)


async def test_where_a_peer_was_found_it_is_looked_for_again_at_once_for_a_while(
    dials: StrangerDials, autojump_clock: trio.testing.MockClock
) -> None:
    async def answer(address: str) -> None:
        await trio.sleep(0.05)

    victim = Victim(dials)
    await dials.dial(PEER, "/ip4/11.0.0.1/tcp/1", answer, hearsay=True)
    tries = [await victim.dial(PEER, "/ip4/11.0.0.1/tcp/1") for _ in range(6)]
    assert tries == [True, True, True, True, False, False]


async def test_a_dial_that_lost_a_race_is_not_held_against_its_address(
    dials: StrangerDials, autojump_clock: trio.testing.MockClock
) -> None:
    victim = Victim(dials)
    with trio.move_on_after(0.01):
        await victim.dial(PEER, "/ip4/11.0.0.1/tcp/1")
    assert await victim.dial(PEER, "/ip4/11.0.0.1/tcp/1")


async def test_on_one_machine_each_port_is_an_address(
    dials: StrangerDials, autojump_clock: trio.testing.MockClock
) -> None:
    dials.note_own(["/ip4/127.0.0.1/tcp/4001"])
    victim = Victim(dials)
    tried = [await victim.dial(f"peer {n}", f"/ip4/127.0.0.1/tcp/{n + 1}") for n in range(50)]
    again = [await victim.dial(f"other {n}", f"/ip4/127.0.0.1/tcp/{n + 1}") for n in range(50)]
    assert all(tried)
    assert not any(again)


async def test_a_network_where_nobody_was_met_is_no_home_though_it_is_private(
    dials: StrangerDials, autojump_clock: trio.testing.MockClock
) -> None:
    """Sixteen ports of each of sixteen hosts that have nothing to do with the swarm, told of for a minute."""
    dials.note_own(["/ip4/127.0.0.1/tcp/4001"])
    victim = Victim(dials)
    began_at = trio.current_time()
    while trio.current_time() < began_at + 60:
        for n in range(256):
            await victim.dial(f"peer {n}", f"/ip4/127.66.0.{n % 16 + 1}/tcp/{n // 16 + 1}")
        await trio.sleep(1)
    assert len(victim.dialled) <= 20


async def test_ports_at_home_where_somebody_else_answers_are_tried_again_ever_more_rarely(
    dials: StrangerDials, autojump_clock: trio.testing.MockClock
) -> None:
    """Sixteen services of this machine that are no peers: three nodes make less than a dial a second."""
    dials.note_own(["/ip4/127.0.0.1/tcp/4001"])
    victim = Victim(dials)
    began_at = trio.current_time()
    while trio.current_time() < began_at + 120:
        for n in range(256):
            await victim.dial(f"peer {n}", f"/ip4/127.0.0.1/tcp/{n % 16 + 1}")
        await trio.sleep(1)
    assert 16 <= len(victim.dialled) <= 40


async def test_closed_ports_at_home_keep_nobody_from_being_found(
    dials: StrangerDials, autojump_clock: trio.testing.MockClock
) -> None:
    dials.note_own(["/ip4/127.0.0.1/tcp/4001"])

    async def refuse(address: str) -> None:
        await trio.sleep(0.001)
        raise OpenConnectionError("refused") from ConnectionRefusedError(111, "refused")

    async def answer(address: str) -> None:
        await trio.sleep(0.001)

    for n in range(200):
        dials.teller = lambda peer_id: peer_id
        with pytest.raises(OpenConnectionError):
            await dials.dial(f"peer {n}", f"/ip4/127.0.0.1/tcp/{n + 1}", refuse, hearsay=True)
    await dials.dial(PEER, "/ip4/127.0.0.1/tcp/4002", answer, hearsay=True)
    assert dials.is_proved(PEER, "127.0.0.1", 4002)
