"""What becomes of a running session: its lease, its successors, and the relays that it leaves."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import dataclass

import pytest
import trio
import trio.testing
from torch import Tensor

from p2pinfer.errors import PeerVanished
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.node.events import SessionClosed
from p2pinfer.node.protocol.frames import FrameStream, encode_header
from p2pinfer.node.protocol.messages import (
    CHAIN_PROTOCOL,
    Expect,
    Message,
    Opened,
    Probe,
    Relink,
    Relinked,
    Successor,
)
from p2pinfer.node.protocol.relay_upgrade import is_worth_moving
from p2pinfer.node.transport.line_rate import NO_LINE
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.session.session import Session

from ..chain_swarm import Swarm, assert_close, hidden_states, local_output, open_swarm, refusal


async def test_an_idle_session_is_closed_when_its_lease_has_run_out(
    checkpoint: Checkpoint, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_swarm(checkpoint, lease_s=20.0) as swarm:
        frames = await swarm.ask()
        assert (await refusal(frames)).code == "lease_expired"
        assert trio.current_time() >= 20


@pytest.mark.parametrize(
    "message",
    [Expect("another"), Probe(0), Relink(0, Successor("nobody"), 0, 0, 1, 1, switch=False)],
    ids=["expect", "probe", "relink"],
)
async def test_nothing_but_steps_keeps_a_session_alive(
    checkpoint: Checkpoint, autojump_clock: trio.testing.MockClock, message: Message
) -> None:
    """Whoever says every few seconds that others may feed it, and does nothing, holds no room."""
    async with open_swarm(checkpoint, 4, lease_s=10.0) as swarm:
        session = await swarm.session()
        control = swarm.streams("client", "a")[-1]
        for _ in range(4):
            await control.send_all(encode_header(message, 0) if swarm.servers["a"].sessions else b"")
            await trio.sleep(3)
        assert swarm.servers["a"].sessions == 0
        await session.aclose()


async def test_a_client_that_stops_reading_is_let_go_of_when_its_lease_has_run_out(
    checkpoint: Checkpoint, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm(checkpoint, lease_s=10.0) as swarm:
        frames = await swarm.ask()
        assert isinstance((await frames.receive())[0], Opened)

        async def blocked(self: FrameStream, message: Message, payload: bytes = b"") -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(FrameStream, "send", blocked)
        await trio.sleep(11)
        assert swarm.servers["a"].sessions == 0
        await swarm.all_closed()


async def test_a_client_that_vanishes_leaves_nothing_behind(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, 2, 5) as swarm:
        session = await swarm.session()
        await session.prefill(hidden_states(6), 0)
        for peer in "abc":
            await swarm.network.cut("client", peer)
        await swarm.all_closed()
        closed = [event.reason for event in swarm.events if isinstance(event, SessionClosed)]
        assert closed == ["the client vanished"] * 3
        await session.aclose()


async def test_a_session_changes_its_successor_so_often_and_no_more(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, 4, max_relinks=2) as swarm:
        await swarm.ask("b", predecessor="a")
        frames = await swarm.ask("a", successor=Successor("b"))
        assert isinstance((await frames.receive())[0], Opened)
        for number in range(2):
            await frames.send(Relink(number, Successor("b"), 0, 0, 1, number + 1, True))
            assert (await frames.receive())[0] == Relinked(number)
        await frames.send(Relink(2, Successor("b"), 0, 0, 1, 3, True))
        refused = await refusal(frames)
        assert refused.code == "protocol" and "more than 2 successors" in refused.message


async def test_a_hop_whose_successor_is_gone_says_so_and_keeps_the_session(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, 4) as swarm:
        session = await swarm.session()
        await session.prefill(hidden_states(6), 0)
        await swarm.network.cut("a", "b")
        with pytest.raises(PeerVanished) as caught:
            await session.decode(hidden_states(1), 6)
        assert caught.value.peer_id == "b"
        assert swarm.servers["a"].sessions == 1
        await session.aclose()
        await swarm.all_closed()


async def test_a_successor_out_of_reach_is_named(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, 4) as swarm:
        frames = await swarm.ask(successor=Successor("nobody"))
        refused = await refusal(frames)
        assert (refused.code, refused.peer_id) == ("successor_unreachable", "nobody")
        await swarm.all_closed()


async def test_a_successor_that_does_not_expect_us_is_named(
    checkpoint: Checkpoint, autojump_clock: trio.testing.MockClock
) -> None:
    """The client opened a session here, and none there."""
    async with open_swarm(checkpoint, 4, handshake_timeout_s=10) as swarm:
        frames = await swarm.ask(successor=Successor("b"))
        refused = await refusal(frames)
        assert (refused.code, refused.peer_id) == ("successor_unreachable", "b")
        await swarm.all_closed()


async def test_a_successor_that_never_answers_is_given_up(
    checkpoint: Checkpoint, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_swarm(checkpoint, 4, dial_timeout_s=10) as swarm:

        async def say_nothing(stream: object) -> None:
            await trio.sleep_forever()

        swarm.network.host("mute").serve(CHAIN_PROTOCOL, say_nothing)
        frames = await swarm.ask(successor=Successor("mute"))
        refused = await refusal(frames)
        assert (refused.code, refused.peer_id) == ("successor_unreachable", "mute")


@dataclass
class Text:
    """A session whose every output is held against one machine's."""

    session: Session
    hidden: Tensor
    expected: Tensor
    position: int = 0

    async def begin(self, tokens: int) -> None:
        """The prompt."""
        last = await self.session.prefill(self.hidden[:tokens], 0)
        assert_close(last, self.expected[tokens - 1 : tokens])
        self.position = tokens

    async def go_on_to(self, stop: int) -> None:
        """Token by token."""
        for position in range(self.position, stop):
            output = await self.session.decode(self.hidden[position : position + 1], position)
            assert_close(output, self.expected[position : position + 1])
        self.position = stop


@asynccontextmanager
async def relayed_text(
    checkpoint: Checkpoint, *cuts: int, relayed: set[tuple[str, str]]
) -> AsyncGenerator[tuple[Swarm, Text]]:
    """A text that has begun over relays; afterwards nothing has failed and nothing is left."""
    hidden = hidden_states(40)
    async with open_swarm(checkpoint, *cuts) as swarm:
        swarm.network.relayed = relayed
        text = Text(await swarm.session(), hidden, local_output(checkpoint, hidden))
        await text.begin(8)
        yield swarm, text
        assert text.session.failovers == 0
        await text.session.aclose()
        await swarm.all_closed()


async def test_a_link_leaves_its_relay_in_the_middle_of_a_session(checkpoint: Checkpoint) -> None:
    async with relayed_text(checkpoint, 3, 6, relayed={("a", "b"), ("b", "c")}) as (swarm, text):
        await text.go_on_to(12)
        swarm.network.relayed.clear()
        await text.go_on_to(20)
        await swarm.upgraded(2, "a", "b")
        await text.go_on_to(40)
        assert (len(swarm.streams("a", "b")), len(swarm.streams("b", "c"))) == (2, 2)


async def test_the_clients_streams_leave_their_relays_in_the_middle_of_a_session(
    checkpoint: Checkpoint,
) -> None:
    async with relayed_text(checkpoint, 3, 6, relayed={("client", "a"), ("client", "c")}) as (swarm, text):
        await text.go_on_to(12)
        swarm.network.relayed.clear()
        await text.go_on_to(20)
        await swarm.upgraded(2, "client")
        await text.go_on_to(24)
        for target in "ac":  # what they left may break now
            await swarm.streams("client", target)[0].reset()
        await trio.testing.wait_all_tasks_blocked(0.01)
        await text.go_on_to(40)
        assert [len(swarm.streams("client", target)) for target in "abc"] == [2, 1, 2]


async def test_a_link_does_not_move_while_a_prompt_is_on_its_way(checkpoint: Checkpoint) -> None:
    relayed = {("a", "b"), ("client", "a"), ("client", "b")}
    async with relayed_text(checkpoint, 3, relayed=relayed) as (swarm, text):
        chunk = await text.session.submit(text.hidden[8:12], 8, returns=0)
        await chunk
        relayed.remove(("a", "b"))
        for number, hop in enumerate(
            "ab", 1
        ):  # the client has none on its way; between its two looks, a looks
            relayed.remove(("client", hop))
            await swarm.upgraded(number, "client")
        assert swarm.network.hosts["a"].counts.total("upgrades") == 0
        last = await text.session.submit(text.hidden[12:16], 12, returns=1)
        assert_close(await last, text.expected[15:16])
        await swarm.upgraded(1, "a")
        text.position = 16
        await text.go_on_to(24)


async def test_a_session_begins_with_a_prompt_on_its_way(checkpoint: Checkpoint) -> None:
    """Else its link begins to move just when the first chunk comes, which over a long way takes seconds."""
    async with open_swarm(checkpoint, 3) as swarm:
        session, hidden = await swarm.session(), hidden_states(9)
        (hop,) = swarm.servers["a"]._sessions.values()  # pyright: ignore[reportPrivateUsage]
        assert not is_worth_moving(hop.prompt_at, NO_LINE)
        await session.prefill(hidden[:8], 0)
        assert is_worth_moving(hop.prompt_at, NO_LINE)
        await session.aclose()
        await swarm.all_closed()


async def test_a_successor_whose_link_moves_while_it_is_asked_is_there(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former link is lost by the move, and the edge need not be made anew for it."""
    async with relayed_text(checkpoint, 3, relayed=set()) as (swarm, text):
        (hop,) = swarm.servers["a"]._sessions.values()  # pyright: ignore[reportPrivateUsage]
        former = hop.neighbours.link
        assert former is not None
        other = copy(former)

        async def lost_by_a_move(within_s: float) -> bool:
            hop.neighbours.link = other
            return False

        monkeypatch.setattr(former, "is_there", lost_by_a_move)
        alive = await text.session.chain.hops[0].probe(15.0)
        assert alive is not None
        assert alive.successor
        hop.neighbours.link = former


async def test_a_link_that_cannot_be_made_anew_stays_on_its_relay(checkpoint: Checkpoint) -> None:
    async with relayed_text(checkpoint, 3, relayed={("a", "b")}) as (swarm, text):
        tried = trio.Event()

        async def refuse(stream: PeerStream) -> None:
            tried.set()
            await stream.aclose()

        swarm.network.hosts["b"].serve(CHAIN_PROTOCOL, refuse)
        swarm.network.relayed.clear()
        await tried.wait()
        await text.go_on_to(12)
        assert swarm.network.hosts["a"].counts.total("upgrades") == 0
