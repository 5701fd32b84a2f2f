"""Who gets a session, and how much of a node."""

from __future__ import annotations

import pytest
import trio

from p2pinfer.errors import PeerRefused, PeerVanished
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.node.events import SessionClosed, SessionOpened, SessionRefused
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.protocol.frames import FrameStream, encode_header
from p2pinfer.node.protocol.messages import (
    CHAIN_PROTOCOL,
    FORMER_SESSION_PROTOCOL,
    SESSION_PROTOCOL,
    Attach,
    End,
    Move,
    Opened,
    Refused,
    Step,
)
from p2pinfer.node.transport.connection_gate import Gate
from p2pinfer.node.transport.identity import new_identity

from ..chain_swarm import SESSION, hidden_states, open_swarm, refusal


@pytest.mark.parametrize(
    "code, change",
    [
        ("wrong_model", {"revision": "another"}),
        ("wrong_span", {"stop": 9}),
        ("wrong_span", {"start": 4, "stop": 4}),
        ("cache_full", {"max_tokens": 1 << 20}),
    ],
)
async def test_what_cannot_be_served_is_refused_with_its_reason(
    checkpoint: Checkpoint, code: str, change: dict[str, object]
) -> None:
    async with open_swarm(checkpoint) as swarm:
        frames = await swarm.ask("a", **change)
        assert (await refusal(frames)).code == code
        assert [event.code for event in swarm.events if isinstance(event, SessionRefused)] == [code]
        await swarm.all_closed()


async def test_what_can_never_fit_is_told_what_would(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        cache = swarm.runners["a"].cache
        most = int(0.75 * cache.capacity_tokens)
        with pytest.raises(
            PeerRefused, match=rf"one of \d+ would; it could never have more than {most}"
        ) as caught:
            await swarm.session(cache.capacity_tokens + 1)
        assert caught.value.fits == most // cache.page_tokens * cache.page_tokens
        await (await swarm.session(caught.value.fits)).aclose()
        await swarm.all_closed()


async def test_a_session_that_would_overflow_the_replay_log_is_refused_and_its_cache_is_given_back(
    checkpoint: Checkpoint,
) -> None:
    async with open_swarm(checkpoint, 4, replay_bytes=1000) as swarm:
        with pytest.raises(PeerRefused, match="replay log full") as caught:
            await swarm.session()
        assert caught.value.code == "cache_full"
        await swarm.all_closed()


async def test_sessions_beyond_the_limit_are_refused(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, max_sessions=2) as swarm:
        sessions = [await swarm.session(), await swarm.session()]
        with pytest.raises(PeerRefused, match="2 sessions are open") as caught:
            await swarm.session()
        assert (caught.value.code, caught.value.peer_id) == ("busy", "a")
        for session in sessions:
            await session.aclose()
        await swarm.all_closed()
        await (await swarm.session()).aclose()


async def test_a_session_id_cannot_be_opened_twice(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        first = await swarm.ask()
        assert isinstance((await first.receive())[0], Opened)
        assert (await refusal(await swarm.ask())).code == "busy"
        await first.end()


async def test_a_hop_says_what_chunks_take_once_there_was_one(checkpoint: Checkpoint) -> None:
    async def step_us(stop: int) -> float:
        frames = await swarm.ask(stop=stop)
        opened, _ = await frames.receive()
        await frames.end()
        await swarm.all_closed()
        assert isinstance(opened, Opened)
        return opened.pass_us + opened.token_ns / 1e3

    async with open_swarm(checkpoint) as swarm:
        assert await step_us(8) == 0
        session = await swarm.session()
        await session.prefill(hidden_states(20), 0)
        await session.aclose()
        assert await step_us(8) == pytest.approx(10_000, abs=2)  # a token of 100 a second
        assert await step_us(4) == pytest.approx(5_000, abs=2)  # of half the blocks


async def test_a_leaving_node_refuses_newcomers_and_goes_on_serving(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        session = await swarm.session()
        swarm.servers["a"].refuse_newcomers()
        with pytest.raises(PeerRefused, match="shutting down"):
            await swarm.session()
        assert len(await session.prefill(hidden_states(3), 0)) == 1
        await session.aclose()


async def test_one_client_cannot_have_all_sessions(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, max_sessions=4, max_sessions_per_client=2) as swarm:
        greedy = [await swarm.session() for _ in range(2)]
        with pytest.raises(PeerRefused, match="2 sessions of yours are open") as caught:
            await swarm.session()
        assert (caught.value.code, caught.value.is_passing) == ("busy", True)
        swarm.client = swarm.network.host("another")
        await (await swarm.session()).aclose()
        for session in greedy:
            await session.aclose()
        await swarm.all_closed()
        assert swarm.network.hosts["a"].counts.by_label("refusals") == {"busy": 1}
        assert swarm.network.hosts["a"].counts.total("sessions_opened") == 3


async def test_one_client_cannot_have_the_whole_cache(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        cache = swarm.runners["a"].cache
        half = cache.capacity_tokens // 2
        greedy = await swarm.session(half)
        with pytest.raises(PeerRefused, match="over one client's share") as caught:
            await swarm.session(half)
        assert (caught.value.code, caught.value.is_passing) == ("over_share", True)
        fits = caught.value.fits
        with pytest.raises(PeerRefused, match=f"; {fits} would not"):
            await swarm.session(fits + 1)
        assert cache.free_tokens >= half - cache.page_tokens
        swarm.client = swarm.network.host("another")
        await (await swarm.session(half // 2)).aclose()
        await greedy.aclose()
        await swarm.all_closed()


async def test_who_ends_a_session_to_open_a_larger_one_finds_the_room_of_both(checkpoint: Checkpoint) -> None:
    """Also where the opening is read first."""
    async with open_swarm(checkpoint) as swarm:
        large = swarm.runners["a"].cache.capacity_tokens // 2
        for _ in range(5):
            former = await swarm.session(large)
            async with trio.open_nursery() as nursery:
                larger = await swarm.ask(max_tokens=large + 64)
                nursery.start_soon(former.aclose)
                assert isinstance((await larger.receive())[0], Opened)
            await larger.end()
            await swarm.all_closed()


async def test_one_client_cannot_have_the_whole_replay_log(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, 4, replay_bytes=100 * 1280) as swarm:
        greedy = await swarm.session(64)
        with pytest.raises(PeerRefused, match="replay log would be over one client's share") as caught:
            await swarm.session(32)
        assert caught.value.code == "over_share"
        assert caught.value.fits == 75 - 64
        with pytest.raises(PeerRefused):
            await swarm.session(75 - 64 + 1)
        swarm.client = swarm.network.host("another")
        await (await swarm.session(16)).aclose()
        await greedy.aclose()
        await swarm.all_closed()
        assert swarm.servers["a"].replay_bytes == 0


async def test_one_session_cannot_have_more_than_its_part_of_the_replay_log(checkpoint: Checkpoint) -> None:
    """A longer one runs all the same: tests/session/test_failover.py says who is replayed from then."""
    async with open_swarm(checkpoint, 4, replay_bytes_per_session=63 * 1280) as swarm:
        session = await swarm.session(64)
        await session.prefill(hidden_states(64), 0)
        assert swarm.servers["a"].replay_bytes == 63 * 1280
        await session.aclose()
        await swarm.all_closed()
        assert swarm.servers["a"].replay_bytes == 0


async def test_only_the_named_predecessor_may_feed_a_session(
    checkpoint: Checkpoint, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_swarm(checkpoint, handshake_timeout_s=10) as swarm:
        swarm.network.host("mallory")
        swarm.network.host("friend")
        control = await swarm.ask(predecessor="friend")
        assert isinstance((await control.receive())[0], Opened)
        for sender, session in (("mallory", SESSION), ("friend", b"t" * 16)):
            chain = await swarm.frames("a", CHAIN_PROTOCOL, sender)
            await chain.send(Attach(session))
            assert (await refusal(chain)).code == "no_session"
        await control.send(Step(0, 0, 0, 1, 1), bytes(1280))  # nor may the client
        assert (await refusal(control)).code == "protocol"


async def test_who_is_not_listed_as_a_client_is_told_how_to_ask(checkpoint: Checkpoint) -> None:
    listed = new_identity().peer_id
    async with open_swarm(checkpoint) as swarm:
        swarm.network.hosts["a"].gate = Gate(HostConfig(allow=(f"clients:{listed}",)))
        refused = await refusal(await swarm.ask())
        assert refused.code == "no_session"  # a code that clients of any version know
        assert refused.message.startswith(
            "this node does not serve client client: it is not on the allow list;"
        )
        assert "--identity FILE" in refused.message
        assert swarm.servers["a"].sessions == 0
        with pytest.raises(PeerRefused, match="does not serve client") as caught:
            await swarm.session()
        assert (caught.value.code, caught.value.is_lasting) == ("not_admitted", True)
        told = [event for event in swarm.events if isinstance(event, SessionRefused)]
        assert [(event.peer_id, event.code) for event in told] == [("client", "no_session")] * 2


async def test_who_is_not_listed_as_a_node_feeds_no_session(checkpoint: Checkpoint) -> None:
    listed = new_identity().peer_id
    async with open_swarm(checkpoint) as swarm:
        swarm.network.hosts["a"].gate = Gate(HostConfig(allow=(f"nodes:{listed}",)))
        swarm.network.host("friend")
        control = await swarm.ask(predecessor="friend")
        assert isinstance((await control.receive())[0], Opened)
        chain = await swarm.frames("a", CHAIN_PROTOCOL, "friend")
        await chain.send(Attach(SESSION))
        assert (await refusal(chain)).code == "no_session"


async def test_a_predecessor_that_says_something_else_ends_the_session(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        swarm.network.host("friend")
        control = await swarm.ask(predecessor="friend")
        await control.receive()
        chain = await swarm.frames("a", CHAIN_PROTOCOL, "friend")
        await chain.send(Attach(SESSION))
        await chain.receive()
        await chain.send(Opened("float32"))
        refused = await refusal(control)
        assert (refused.code, refused.peer_id) == ("protocol", "friend")


@pytest.mark.parametrize("protocol", [SESSION_PROTOCOL, CHAIN_PROTOCOL])
async def test_a_stream_that_begins_wrongly_or_not_at_all_is_dropped(
    checkpoint: Checkpoint, protocol: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_swarm(checkpoint, handshake_timeout_s=10) as swarm:
        wrong, silent = await swarm.frames("a", protocol), await swarm.frames("a", protocol)
        await wrong.send(End())
        for frames in (wrong, silent):
            with pytest.raises(PeerVanished):
                await frames.receive()


@pytest.mark.parametrize("protocol", [SESSION_PROTOCOL, CHAIN_PROTOCOL])
async def test_nobody_can_send_tensors_before_being_let_in(checkpoint: Checkpoint, protocol: str) -> None:
    """The frame is refused by its header; its payload never comes, and nobody waits for it."""
    async with open_swarm(checkpoint, handshake_timeout_s=1000) as swarm:
        stream = await swarm.network.hosts["client"].open_stream("a", protocol)
        await stream.send_all(encode_header(Step(0, 0, 0, 1, 1), 1280))
        with pytest.raises(PeerVanished):
            await FrameStream(stream, max_payload_bytes=0).receive()


async def test_an_operator_hears_of_sessions(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        session = await swarm.session(max_tokens=32)
        await session.prefill(hidden_states(6), 0)
        await session.aclose()
        await swarm.all_closed()
        opened, closed = swarm.events
        assert opened == SessionOpened("client", (0, 8), 32, 1)
        assert closed == SessionClosed("client", 6, "done", 0)


async def test_a_client_moves_no_session_but_its_own(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        session = await swarm.session()
        swarm.network.host("stranger")
        for sender, session_id in (("stranger", session.session_id), ("client", bytes(16))):
            frames = await swarm.frames("a", sender=sender)
            await frames.send(Move(session_id))
            assert (await refusal(frames)).code == "no_session"
        await session.decode(hidden_states(2), 0)
        await session.aclose()
        await swarm.all_closed()


async def test_a_client_of_an_earlier_version_hears_why_it_gets_no_session(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        frames = await swarm.frames("a", FORMER_SESSION_PROTOCOL)
        await frames.send(swarm.opening())
        refused, _ = await frames.receive()
        assert isinstance(refused, Refused)
        assert refused.code == "protocol"
        assert "your version of p2pinfer" in refused.message
        assert isinstance((await frames.receive())[0], End)
        assert not swarm.events
