"""Keeping places at relays, on trio's clock, with relays that do as they are told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, cast

import pytest
import trio
import trio.testing

from p2pinfer.errors import PeerRefused, PeerUnreachable
from p2pinfer.node.host.host import Host
from p2pinfer.node.reach import relay_reservations
from p2pinfer.node.reach.circuit import Granted
from p2pinfer.node.reach.relay_reservations import RelayCandidate, RelayKeeper
from p2pinfer.recent import Recent

Clock = trio.testing.MockClock
NAMES = ("one", "two", "three")


class Relays:
    """A host, and the relays around it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.refusing: set[str] = set()
        self.dead: set[str] = set()
        self.relayed: set[str] = set()
        self.expires_s = 3600.0
        self.told: Sequence[str] = ()
        self.on_lost: Callable[[str], None]
        self.candidates = [RelayCandidate(name, (f"/ip4/11.0.0.1/tcp/{n}",)) for n, name in enumerate(NAMES)]
        self.changes = 0

    def when_disconnected(self, callback: Callable[[str], None]) -> None:
        self.on_lost = callback

    def be_reached_through(self, addrs: Sequence[str]) -> None:
        self.told = addrs

    async def connect(self, peer_id: str, addrs: Sequence[str], *, hearsay: bool) -> None:
        await trio.lowlevel.checkpoint()
        if peer_id in self.dead:
            raise PeerUnreachable("it is off", peer_id)

    def connection_kind(self, peer_id: str) -> Literal["direct", "relayed"]:
        return "relayed" if peer_id in self.relayed else "direct"

    async def reserve(self, host: object, peer_id: str) -> Granted:
        await trio.lowlevel.checkpoint()
        self.asked.append(peer_id)
        if peer_id in self.refusing:
            raise PeerRefused("full", peer_id)
        return Granted(peer_id, self.expires_s)

    def lose(self, peer_id: str, *, for_good: bool = True) -> None:
        if for_good:
            self.dead.add(peer_id)
        self.on_lost(peer_id)

    def note(self) -> None:
        self.changes += 1


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> Relays:
    found = Relays()
    monkeypatch.setattr(relay_reservations, "reserve", found.reserve)
    return found


@pytest.fixture
def keeper(around: Relays, nursery: trio.Nursery) -> RelayKeeper:
    keeping = RelayKeeper(cast(Host, around), 2, lambda: around.candidates, around.note)
    nursery.start_soon(keeping.serve)
    return keeping


async def test_as_many_places_as_wanted_are_taken_and_announced(
    keeper: RelayKeeper, around: Relays, autojump_clock: Clock
) -> None:
    await trio.sleep(1)
    assert keeper.relays == ("one", "two")
    assert around.told == ["/ip4/11.0.0.1/tcp/0/p2p/one", "/ip4/11.0.0.1/tcp/1/p2p/two"]
    assert around.changes == 2


async def test_places_are_renewed_long_before_they_end(
    keeper: RelayKeeper, around: Relays, autojump_clock: Clock
) -> None:
    around.expires_s = 200.0
    await trio.sleep(1010)
    assert around.asked.count("one") in (10, 11)
    assert keeper.relays == ("one", "two")


async def test_a_relay_that_dies_is_replaced_at_once(
    keeper: RelayKeeper, around: Relays, autojump_clock: Clock
) -> None:
    await trio.sleep(100)
    around.lose("one")
    await trio.sleep(0.1)
    assert keeper.relays == ("two", "three")


async def test_a_relay_that_accepts_and_then_drops_is_not_asked_in_circles(
    keeper: RelayKeeper, around: Relays, autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    around.candidates = around.candidates[:1]
    with caplog.at_level(logging.INFO, "p2pinfer"):
        for _ in range(600):
            await trio.sleep(1)
            if keeper.relays:
                around.lose("one", for_good=False)
    assert around.asked.count("one") <= 8
    assert "lost relay " in caplog.text
    around.candidates = [RelayCandidate("two", ("/ip4/11.0.0.1/tcp/1",))]
    await trio.sleep(10)
    assert keeper.relays == ("two",)


async def test_who_refuses_is_asked_ever_more_rarely(
    keeper: RelayKeeper, around: Relays, autojump_clock: Clock
) -> None:
    around.refusing = set(NAMES)
    await trio.sleep(3600)
    assert keeper.relays == ()
    assert 5 < around.asked.count("one") < 15
    around.refusing = set()
    await trio.sleep(700)
    assert len(keeper.relays) == 2


@pytest.mark.parametrize("is_line_another", [True, False])
async def test_relays_are_not_to_blame_when_our_own_line_became_another_one(
    keeper: RelayKeeper, around: Relays, autojump_clock: Clock, is_line_another: bool
) -> None:
    await trio.sleep(4)  # a place that is lost so soon counts against its relay
    around.candidates = around.candidates[:2]
    for name in ("one", "two"):
        around.lose(name, for_good=False)
    await trio.sleep(1)
    assert keeper.relays == ()
    keeper.look_again(forgives=is_line_another)
    await trio.sleep(1)
    assert keeper.relays == (("one", "two") if is_line_another else ())


async def test_a_place_that_is_not_renewed_is_given_up(
    keeper: RelayKeeper, around: Relays, autojump_clock: Clock
) -> None:
    await trio.sleep(1)
    around.refusing = {"one"}
    await trio.sleep(1000)
    assert keeper.relays == ("two", "three")


async def test_a_peer_that_is_itself_relayed_is_no_relay(
    keeper: RelayKeeper, around: Relays, autojump_clock: Clock
) -> None:
    around.relayed = {"one"}
    await trio.sleep(1)
    assert keeper.relays == ("two", "three")


@pytest.mark.parametrize("expires_s", [-3600.0, 1e9, 0.0])
async def test_a_clock_that_is_hours_off_is_told_of_once_and_does_no_harm(
    keeper: RelayKeeper,
    around: Relays,
    autojump_clock: Clock,
    caplog: pytest.LogCaptureFixture,
    expires_s: float,
) -> None:
    around.expires_s = expires_s
    await trio.sleep(1000)
    assert keeper.relays == ("one", "two")
    assert around.asked.count("one") == 4
    assert caplog.text.count("one of the two clocks is wrong") == 1


async def test_once_nobody_is_needed_the_places_are_let_go(
    keeper: RelayKeeper, around: Relays, autojump_clock: Clock
) -> None:
    await trio.sleep(1)
    around.candidates = []
    keeper.look_again()
    await trio.sleep(1)
    assert keeper.relays == ()
    assert around.told == []


async def test_troubles_of_many_strangers_are_forgotten(
    keeper: RelayKeeper, around: Relays, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "_failures", Recent[str, object](3))
    await trio.sleep(1)
    around.refusing = {str(n) for n in range(10)}
    around.candidates = [RelayCandidate(str(n), ("/ip4/11.0.0.1/tcp/1",)) for n in range(10)]
    for name in keeper.relays:
        around.lose(name)
    await trio.sleep(1)
    assert len(keeper._failures) == 3  # pyright: ignore[reportPrivateUsage]
