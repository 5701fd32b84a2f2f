"""Addresses of this computer that change under its connections. Simulated time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from p2pinfer.node.host.host import Host
from p2pinfer.node.reach.own_addresses import LOOK_S, hang_up_from, own_addresses, watch_own_addresses

OLD, NEW, OTHER = "11.0.3.1", "11.0.3.2", "2abc::1"


async def test_another_address_is_noticed_at_the_next_look_and_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    have = frozenset({OLD, OTHER})
    told: list[tuple[float, frozenset[str]]] = []

    async def note(gone: frozenset[str]) -> None:
        told.append((trio.current_time(), gone))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_own_addresses, note, lambda: have)
        await trio.sleep(10.5)
        have = frozenset({NEW, OTHER})
        await trio.sleep(LOOK_S)
        assert [gone for _, gone in told] == [{OLD}]
        await trio.sleep(20)
        assert len(told) == 1
        have |= {"192.168.1.10"}  # one more breaks nothing, and is worth a look all the same
        await trio.sleep(LOOK_S)
        assert [gone for _, gone in told] == [{OLD}, frozenset()]
        nursery.cancel_scope.cancel()


class Connection:
    """Leaves from an address, and can be closed."""

    def __init__(self, ip: str) -> None:
        self.is_closed = False
        raw = SimpleNamespace(local_ip=ip)
        self.muxed_conn = SimpleNamespace(peer_id=ip, secured_conn=SimpleNamespace(raw=raw))

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()
        self.is_closed = True


async def test_connections_from_an_address_that_is_gone_are_ended_and_no_others() -> None:
    dead, alive, relayed = Connection(OLD), Connection(OTHER), Connection("")
    network = SimpleNamespace(connections={"a": [dead, alive], "b": [relayed]})
    host = SimpleNamespace(libp2p=SimpleNamespace(get_network=lambda: network))
    await hang_up_from(cast(Host, cast(Any, host)), {OLD})
    assert [each.is_closed for each in (dead, alive, relayed)] == [True, False, False]


def test_this_computer_has_addresses() -> None:
    assert own_addresses()
