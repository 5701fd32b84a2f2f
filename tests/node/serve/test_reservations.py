"""Room that sessions reserve and do not use: who gets it, and what becomes of what is in it."""

from __future__ import annotations

import pytest
import trio

from p2pinfer.errors import PeerRefused
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import Opened
from p2pinfer.node.serve import server
from p2pinfer.session.session import Session

from ..chain_swarm import Swarm, assert_close, hidden_states, local_output, open_swarm


async def hoard(swarm: Swarm, address_range: str = "") -> list[FrameStream]:
    """Throw-away identities reserve what they can, until nothing is left that is not theirs."""
    held: list[FrameStream] = []
    cache = swarm.runners["a"].cache
    while (free := cache.free_tokens) >= cache.page_tokens:
        name = f"greedy{len(held)}"
        swarm.network.host(name)
        if address_range:
            swarm.network.ranges[name] = address_range
        frames = await swarm.frames("a", sender=name)
        opening = swarm.opening(max_tokens=max(int(free * 0.74), 1), session=name.encode().ljust(16))
        await frames.send(opening)
        assert isinstance((await frames.receive())[0], Opened)
        held.append(frames)
    return held


async def stranger(swarm: Swarm, name: str, tokens: int) -> Session:
    swarm.client = swarm.network.host(name)
    return await swarm.session(tokens)


@pytest.mark.parametrize("address_range", ["", "192.0.2.0/24"], ids=["many lines", "one line"])
async def test_reservations_without_a_step_keep_nobody_out(
    checkpoint: Checkpoint, address_range: str
) -> None:
    """Eight identities held all but one page, and everybody else was told to try again soon."""
    async with open_swarm(checkpoint) as swarm:
        held = await hoard(swarm, address_range)
        assert len(held) >= 3
        cache = swarm.runners["a"].cache
        assert swarm.servers["a"].free_tokens == cache.capacity_tokens  # which is announced
        if address_range:  # who shares the line of such a crowd is no worse off
            swarm.network.ranges["honest"] = address_range
        session = await stranger(swarm, "honest", cache.capacity_tokens // 2)
        hidden = hidden_states(300)
        assert_close((await session.prefill(hidden, 0))[-1], local_output(checkpoint, hidden)[-1])
        await session.aclose()


async def test_a_session_whose_room_was_lent_goes_on_with_what_it_has_computed(
    checkpoint: Checkpoint,
) -> None:
    async with open_swarm(checkpoint) as swarm:
        cache = swarm.runners["a"].cache
        hidden = hidden_states(80)
        first = await swarm.session(cache.capacity_tokens // 2)
        await first.prefill(hidden[:70], 0)
        others = [await stranger(swarm, f"other{n}", cache.capacity_tokens // 3) for n in range(2)]
        for each in others:
            await each.prefill(hidden_states(60, seed=1), 0)
        expected = local_output(checkpoint, hidden)
        for position in range(70, 75):
            output = await first.decode(hidden[position : position + 1], position)
            assert_close(output[0], expected[position])
        for each in others:
            await each.aclose()
        # With the room back it grows beyond what it had kept.
        more = hidden_states(900, seed=2)
        assert len(await first.prefill(more, 75)) == 1
        await first.aclose()
        await swarm.all_closed()


@pytest.mark.slow
async def test_a_session_that_grows_into_what_others_have_filled_is_refused(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        cache = swarm.runners["a"].cache
        first = await swarm.session(int(cache.capacity_tokens * 0.7))
        await first.prefill(hidden_states(64), 0)
        second = await stranger(swarm, "second", int(cache.capacity_tokens * 0.6))
        await second.prefill(hidden_states(int(cache.capacity_tokens * 0.4)), 0)
        with pytest.raises(PeerRefused, match="other clients have filled") as caught:
            await first.prefill(hidden_states(int(cache.capacity_tokens * 0.6)), 64)
        assert (caught.value.code, caught.value.is_passing) == ("cache_full", True)
        assert len(await second.decode(hidden_states(1), int(cache.capacity_tokens * 0.4))) == 1
        for each in (first, second):
            await each.aclose()
        await swarm.all_closed()


async def test_a_session_that_rests_makes_room_for_one_that_finds_none(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm(checkpoint, max_sessions=2) as swarm:
        resting, busy = await swarm.session(), await swarm.session()
        await resting.decode(hidden_states(1), 0)
        with pytest.raises(PeerRefused, match="2 sessions are open"):
            await stranger(swarm, "third", 64)
        monkeypatch.setattr(server, "PRESSED_IDLE_S", 0.2)
        await trio.sleep(0.3)
        await busy.decode(hidden_states(1), 0)
        third = await stranger(swarm, "third", 64)
        assert len(await third.decode(hidden_states(1), 0)) == 1
        assert len(await busy.decode(hidden_states(1), 1)) == 1
        with pytest.raises(PeerRefused, match="others need the room") as caught:
            await resting.decode(hidden_states(1), 1)
        assert caught.value.code == "lease_expired"
        for each in (resting, busy, third):
            await each.aclose()
        await swarm.all_closed()


async def test_a_replay_log_that_is_not_used_is_lent_and_comes_back(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, 4, replay_bytes=100 * 1280) as swarm:
        idle = await swarm.session(64)
        session = await stranger(swarm, "another", 60)
        await session.prefill(hidden_states(50), 0)
        assert swarm.servers["a"].replay_bytes <= 100 * 1280
        assert len(await idle.prefill(hidden_states(20), 0)) == 1
        for each in (idle, session):
            await each.aclose()
        await swarm.all_closed()
        assert swarm.servers["a"].replay_bytes == 0


async def test_nobodys_session_ends_because_a_client_is_at_its_own_limit(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PRESSED_IDLE_S", -1.0)
    async with open_swarm(checkpoint, max_sessions_per_client=1) as swarm:
        resting = await swarm.session()
        greedy = await stranger(swarm, "greedy", 64)
        with pytest.raises(PeerRefused, match="1 sessions of yours"):
            await swarm.session(64)
        assert len(await resting.decode(hidden_states(1), 0)) == 1
        for each in (resting, greedy):
            await each.aclose()
        await swarm.all_closed()
