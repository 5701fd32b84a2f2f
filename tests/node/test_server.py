"""Sessions over real blocks of the bundled model, with memory in place of the network."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
import trio
import trio.testing
from torch import Tensor

from p2pinfer.errors import PeerRefused, PeerVanished
from p2pinfer.models.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.runner import Chunk, SpanRunner, open_runner
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.control import LOOK_S
from p2pinfer.node.events import Event, SessionClosed, SessionOpened, SessionRefused
from p2pinfer.node.evidence import EvidenceStore
from p2pinfer.node.host import Host
from p2pinfer.node.server import ServedSpan, SpanServer
from p2pinfer.node.wire import (
    CHAIN_PROTOCOL,
    SESSION_PROTOCOL,
    Attach,
    End,
    FrameStream,
    Message,
    Move,
    Open,
    Opened,
    Refused,
    Relink,
    Relinked,
    Result,
    Step,
    Successor,
    encode_header,
)
from p2pinfer.node.worker import Worker, open_worker
from p2pinfer.routing.route import Hop, Route
from p2pinfer.session import Session, SessionConfig, open_session

from .memory import MemoryNetwork, MemoryStream

FLOAT32 = ComputeConfig(device="cpu", dtype="float32", threads=1, cache_bytes=64 << 20)
SESSION = b"s" * 16


@pytest.fixture(scope="module")
def checkpoint(tiny_stories: Path) -> Checkpoint:
    return open_checkpoint(tiny_stories, "tiny-stories")


def hidden_states(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, 320, generator=torch.Generator().manual_seed(seed)) * 0.1


class Swarm:
    """Peers "a", "b", ... that each serve a span, and a client's host."""

    def __init__(self, network: MemoryNetwork, checkpoint: Checkpoint, config: ServeConfig) -> None:
        self.network = network
        self.client: Host = network.host("client")
        self.config = config
        self.events: list[Event] = []
        self.route = Route(())
        self.servers: dict[str, SpanServer] = {}
        self.runners: dict[str, SpanRunner] = {}
        self.spec = checkpoint.spec

    async def session(
        self, max_tokens: int = 64, route: Route | None = None, config: SessionConfig | None = None
    ) -> Session:
        return await open_session(
            self.client,
            self.network.nursery,
            route or self.route,
            self.spec,
            max_tokens=max_tokens,
            codec="float32",
            config=config or SessionConfig(),
        )

    async def frames(
        self, peer: str, protocol: str = SESSION_PROTOCOL, sender: str = "client"
    ) -> FrameStream:
        host = self.network.hosts[sender]
        stream = await host.open_stream(peer, protocol)
        return FrameStream(stream, max_payload_bytes=1 << 22, peer_id=peer)

    def opening(self, peer: str = "a") -> Open:
        span = next(hop.span for hop in self.route.hops if hop.peer_id == peer)
        return Open(SESSION, self.spec.revision, span.start, span.stop, 64, "float32")

    async def all_closed(self) -> None:
        """Until no session is left and every reservation is back."""
        while any(server.sessions for server in self.servers.values()) or any(
            runner.cache.free_tokens < runner.cache.capacity_tokens for runner in self.runners.values()
        ):
            await trio.lowlevel.checkpoint()


@asynccontextmanager
async def open_swarm(checkpoint: Checkpoint, *cuts: int, **limits: float) -> AsyncGenerator[Swarm]:
    """A swarm whose peers divide the model at `cuts`."""
    config = replace(ServeConfig(), **limits)  # type: ignore[arg-type]
    bounds = [0, *cuts, 8]
    async with trio.open_nursery() as nursery:
        swarm = Swarm(MemoryNetwork(nursery), checkpoint, config)
        hops: list[Hop] = []
        workers: list[AbstractAsyncContextManager[Worker]] = []
        for name, start, stop in zip("abcd", bounds, bounds[1:], strict=False):
            span = BlockSpan(start, stop)
            runner = open_runner(checkpoint, span, FLOAT32)
            worker = open_worker(runner, config.max_batch_tokens)
            workers.append(worker)
            served = ServedSpan(checkpoint.spec, span, "float32", runner.cache, await worker.__aenter__())
            server = SpanServer(
                swarm.network.host(name),
                served,
                config,
                swarm.events.append,
                evidence=EvidenceStore(64 << 20, 900),
            )
            server.register()
            swarm.servers[name], swarm.runners[name] = server, runner
            hops.append(Hop(name, span))
        swarm.route = Route(tuple(hops))
        try:
            with trio.fail_after(30):
                yield swarm
        finally:
            nursery.cancel_scope.cancel()
            for opened in workers:
                await opened.__aexit__(None, None, None)


def local_output(checkpoint: Checkpoint, hidden: Tensor) -> Tensor:
    """The whole model in one piece, the oracle."""
    runner = open_runner(checkpoint, BlockSpan(0, 8), FLOAT32)
    return runner.run([Chunk(runner.cache.reserve(len(hidden)), 0, hidden)])[0]


@pytest.mark.parametrize("cuts", [(), (3,), (1, 6), (2, 3, 7)])
async def test_a_chain_computes_what_one_machine_computes(
    checkpoint: Checkpoint, cuts: tuple[int, ...]
) -> None:
    hidden = hidden_states(40)
    expected = local_output(checkpoint, hidden)
    async with open_swarm(checkpoint, *cuts) as swarm:
        session = await swarm.session(config=SessionConfig(chunk_tokens=7, chunks_in_flight=3))
        last = await session.prefill(hidden[:30], 0)
        torch.testing.assert_close(last, expected[29:30], atol=2e-4, rtol=1e-4)
        for position in range(30, 40):
            output = await session.decode(hidden[position : position + 1], position)
            torch.testing.assert_close(output, expected[position : position + 1], atol=2e-4, rtol=1e-4)
        assert len(session.per_hop_ms()) == len(cuts) + 1
        assert session.per_step_ms() >= max(session.per_hop_ms())
        await session.aclose()
        await swarm.all_closed()


async def test_a_route_may_use_a_part_of_what_a_peer_holds(checkpoint: Checkpoint) -> None:
    hidden = hidden_states(9)
    async with open_swarm(checkpoint) as swarm, open_swarm(checkpoint) as other:
        swarm.network.hosts["b"] = other.network.hosts["a"]
        route = Route((Hop("a", BlockSpan(0, 3)), Hop("b", BlockSpan(3, 8))))
        session = await swarm.session(route=route)
        output = await session.decode(hidden, 0)
        torch.testing.assert_close(output, local_output(checkpoint, hidden), atol=2e-4, rtol=1e-4)
        await session.aclose()


async def test_a_lower_position_rolls_every_hop_back(checkpoint: Checkpoint) -> None:
    hidden = hidden_states(20)
    async with open_swarm(checkpoint, 3) as swarm:
        session = await swarm.session()
        await session.prefill(hidden_states(20, seed=1), 0)
        output = await session.decode(hidden[:20], 0)
        torch.testing.assert_close(output, local_output(checkpoint, hidden), atol=2e-4, rtol=1e-4)
        await session.aclose()


async def test_sessions_at_once_do_not_disturb_each_other(checkpoint: Checkpoint) -> None:
    outputs: dict[int, Tensor] = {}
    async with open_swarm(checkpoint, 5) as swarm:

        async def use(seed: int) -> None:
            session = await swarm.session()
            outputs[seed] = await session.prefill(hidden_states(10 + seed, seed), 0)
            await session.aclose()

        async with trio.open_nursery() as nursery:
            for seed in range(8):
                nursery.start_soon(use, seed)
    for seed, output in outputs.items():
        expected = local_output(checkpoint, hidden_states(10 + seed, seed))[-1:]
        torch.testing.assert_close(output, expected, atol=2e-4, rtol=1e-4)


async def refusal(frames: FrameStream) -> Refused:
    """The refusal that ends a stream."""
    message: Message = (await frames.receive())[0]
    while not isinstance(message, Refused):
        assert isinstance(message, Opened | Result)
        message = (await frames.receive())[0]
    assert (await frames.receive())[0] == End()
    return message


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
        frames = await swarm.frames("a")
        await frames.send(msgspec.structs.replace(swarm.opening(), **change))
        assert (await refusal(frames)).code == code
        assert [event.code for event in swarm.events if isinstance(event, SessionRefused)] == [code]
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
        first, second = await swarm.frames("a"), await swarm.frames("a")
        await first.send(swarm.opening())
        assert isinstance((await first.receive())[0], Opened)
        await second.send(swarm.opening())
        assert (await refusal(second)).code == "busy"
        await first.end()


async def test_a_leaving_node_refuses_newcomers_and_goes_on_serving(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        session = await swarm.session()
        swarm.servers["a"].refuse_newcomers()
        with pytest.raises(PeerRefused, match="shutting down"):
            await swarm.session()
        assert len(await session.prefill(hidden_states(3), 0)) == 1
        await session.aclose()


@pytest.mark.parametrize(
    "step, payload, code",
    [
        (Step(0, 0, 1, 1, 1), bytes(1280), "protocol"),  # a gap
        (Step(0, 0, 0, 65, 1), bytes(1280 * 65), "protocol"),  # past the reservation
        (Step(0, 0, 0, 2, 3), bytes(1280 * 2), "protocol"),  # wants more back than it sends
        (Step(0, 0, 0, 2, 1), bytes(1280 * 2 - 1), "protocol"),  # a truncated tensor
        (Step(0, 0, 0, 1, 1), b"\0\0\xc0\x7f" * 320, "wrong_input"),  # not a number
        (Opened("float32"), b"", "protocol"),  # not for a client to say
    ],
)
async def test_a_wrong_frame_ends_its_session_and_touches_no_other(
    checkpoint: Checkpoint, step: Step | Opened, payload: bytes, code: str
) -> None:
    async with open_swarm(checkpoint) as swarm:
        honest = await swarm.session()
        frames = await swarm.frames("a")
        await frames.send(swarm.opening())
        await frames.send(step, payload)
        assert (await refusal(frames)).code == code
        hidden = hidden_states(5)
        output = await honest.decode(hidden, 0)
        torch.testing.assert_close(output, local_output(checkpoint, hidden), atol=2e-4, rtol=1e-4)
        await honest.aclose()
        await swarm.all_closed()


async def test_an_epoch_that_falls_is_a_violation(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        frames = await swarm.frames("a")
        await frames.send(swarm.opening())
        await frames.send(Step(0, 2, 0, 1, 1), bytes(1280))
        await frames.send(Step(1, 1, 1, 1, 1), bytes(1280))
        assert "epoch 1 after 2" in (await refusal(frames)).message


@pytest.mark.parametrize(
    "limit, said",
    [
        ({"max_steps_in_flight": 3}, "more than 3 steps in flight"),
        ({"max_bytes_in_flight": 10 * 1280}, "more than 12800 bytes in flight"),
    ],
)
async def test_more_in_flight_than_allowed_ends_the_session(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, limit: dict[str, int], said: str
) -> None:
    async with open_swarm(checkpoint, **limit) as swarm:
        release = threading.Event()
        run = swarm.runners["a"].run

        def slow(chunks: Sequence[Chunk], span: BlockSpan) -> list[Tensor]:
            release.wait()
            return run(chunks, span)

        monkeypatch.setattr(swarm.runners["a"], "run", slow)
        frames = await swarm.frames("a")
        await frames.send(swarm.opening())
        try:
            for number in range(4):
                await frames.send(Step(number, 0, number * 3, 3, 0), bytes(3 * 1280))
            assert said in (await refusal(frames)).message
        finally:
            release.set()
        await swarm.all_closed()


@pytest.mark.parametrize(
    "limit", [{"max_steps_in_flight": 1}, {"max_chunk_tokens": 3}, {"max_bytes_in_flight": 5 * 1280}]
)
async def test_a_client_keeps_to_what_the_hops_say_they_take(
    checkpoint: Checkpoint, limit: dict[str, int]
) -> None:
    hidden = hidden_states(40)
    async with open_swarm(checkpoint, 3, **limit) as swarm:
        session = await swarm.session()
        last = await session.prefill(hidden, 0)
        torch.testing.assert_close(last, local_output(checkpoint, hidden)[-1:], atol=2e-4, rtol=1e-4)
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
        assert cache.free_tokens >= half - cache.page_tokens
        swarm.client = swarm.network.host("another")
        await (await swarm.session(half // 2)).aclose()
        await greedy.aclose()
        await swarm.all_closed()


async def test_one_client_cannot_have_the_whole_replay_log(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, 4, replay_bytes=100 * 1280) as swarm:
        greedy = await swarm.session(64)
        with pytest.raises(PeerRefused, match="replay log would be over one client's share") as caught:
            await swarm.session(32)
        assert caught.value.code == "over_share"
        swarm.client = swarm.network.host("another")
        await (await swarm.session(16)).aclose()
        await greedy.aclose()
        await swarm.all_closed()
        assert swarm.servers["a"].replay_bytes == 0


async def test_one_session_cannot_have_more_than_its_part_of_the_replay_log(checkpoint: Checkpoint) -> None:
    """A longer one runs all the same: tests/test_failover.py says who is replayed from then."""
    async with open_swarm(checkpoint, 4, replay_bytes_per_session=63 * 1280) as swarm:
        session = await swarm.session(64)
        await session.prefill(hidden_states(64), 0)
        assert swarm.servers["a"].replay_bytes == 63 * 1280
        await session.aclose()
        await swarm.all_closed()
        assert swarm.servers["a"].replay_bytes == 0


async def test_a_session_changes_its_successor_so_often_and_no_more(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, 4, max_relinks=2) as swarm:
        frames = await swarm.frames("a")
        there = await swarm.frames("b")
        await there.send(msgspec.structs.replace(swarm.opening("b"), predecessor="a"))
        await frames.send(msgspec.structs.replace(swarm.opening("a"), successor=Successor("b")))
        assert isinstance((await frames.receive())[0], Opened)
        for number in range(2):
            await frames.send(Relink(number, Successor("b"), 0, 0, 1, number + 1, True))
            assert (await frames.receive())[0] == Relinked(number)
        await frames.send(Relink(2, Successor("b"), 0, 0, 1, 3, True))
        refused = await refusal(frames)
        assert refused.code == "protocol" and "more than 2 successors" in refused.message


async def test_only_the_named_predecessor_may_feed_a_session(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, handshake_timeout_s=0.2) as swarm:
        swarm.network.host("mallory")
        swarm.network.host("friend")
        control = await swarm.frames("a")
        await control.send(msgspec.structs.replace(swarm.opening(), predecessor="friend"))
        assert isinstance((await control.receive())[0], Opened)
        for sender, session in (("mallory", SESSION), ("friend", b"t" * 16)):
            chain = await swarm.frames("a", CHAIN_PROTOCOL, sender)
            await chain.send(Attach(session))
            assert (await refusal(chain)).code == "no_session"
        await control.send(Step(0, 0, 0, 1, 1), bytes(1280))  # nor may the client
        assert (await refusal(control)).code == "protocol"


async def test_a_predecessor_that_says_something_else_ends_the_session(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        swarm.network.host("friend")
        control = await swarm.frames("a")
        await control.send(msgspec.structs.replace(swarm.opening(), predecessor="friend"))
        await control.receive()
        chain = await swarm.frames("a", CHAIN_PROTOCOL, "friend")
        await chain.send(Attach(SESSION))
        await chain.receive()
        await chain.send(Opened("float32"))
        refused = await refusal(control)
        assert (refused.code, refused.peer_id) == ("protocol", "friend")


@pytest.mark.parametrize("protocol", [SESSION_PROTOCOL, CHAIN_PROTOCOL])
async def test_a_stream_that_begins_wrongly_or_not_at_all_is_dropped(
    checkpoint: Checkpoint, protocol: str
) -> None:
    async with open_swarm(checkpoint, handshake_timeout_s=0.05) as swarm:
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


async def test_an_idle_session_is_closed_when_its_lease_has_run_out(
    checkpoint: Checkpoint, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_swarm(checkpoint, lease_s=20.0) as swarm:
        frames = await swarm.frames("a")
        await frames.send(swarm.opening())
        assert (await refusal(frames)).code == "lease_expired"
        assert trio.current_time() >= 20


async def test_a_client_that_stops_reading_is_let_go_of_when_its_lease_has_run_out(
    checkpoint: Checkpoint, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm(checkpoint, lease_s=10.0) as swarm:
        frames = await swarm.frames("a")
        await frames.send(swarm.opening())
        assert isinstance((await frames.receive())[0], Opened)

        async def blocked(self: FrameStream, message: Message, payload: bytes = b"") -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(FrameStream, "send", blocked)
        await trio.sleep(11)
        assert swarm.servers["a"].sessions == 0
        await swarm.all_closed()


async def test_a_failed_step_takes_the_steps_behind_it_along_and_no_other_session(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm(checkpoint) as swarm:
        run, failed = swarm.runners["a"].run, threading.Event()

        def fail_once(chunks: Sequence[Chunk], span: BlockSpan) -> list[Tensor]:
            if len(chunks[0].hidden) == 3 and not failed.is_set():
                failed.set()
                raise RuntimeError("a cosmic ray")
            return run(chunks, span)

        honest, unlucky = await swarm.session(), await swarm.session(config=SessionConfig(chunk_tokens=3))
        monkeypatch.setattr(swarm.runners["a"], "run", fail_once)
        with pytest.raises(PeerRefused, match="a cosmic ray"):
            await unlucky.prefill(hidden_states(12), 0)
        hidden = hidden_states(5)
        output = await honest.decode(hidden, 0)
        torch.testing.assert_close(output, local_output(checkpoint, hidden), atol=2e-4, rtol=1e-4)
        await unlucky.aclose()
        await honest.aclose()
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
        frames = await swarm.frames("a")
        await frames.send(msgspec.structs.replace(swarm.opening(), successor=Successor("nobody")))
        refused = await refusal(frames)
        assert (refused.code, refused.peer_id) == ("successor_unreachable", "nobody")
        await swarm.all_closed()


async def test_a_successor_that_does_not_expect_us_is_named(checkpoint: Checkpoint) -> None:
    """The client opened a session here, and none there."""
    async with open_swarm(checkpoint, 4, handshake_timeout_s=0.05) as swarm:
        frames = await swarm.frames("a")
        await frames.send(msgspec.structs.replace(swarm.opening(), successor=Successor("b")))
        refused = await refusal(frames)
        assert (refused.code, refused.peer_id) == ("successor_unreachable", "b")
        await swarm.all_closed()


async def test_a_successor_that_never_answers_is_given_up(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, 4, dial_timeout_s=0.05) as swarm:

        async def say_nothing(stream: object) -> None:
            await trio.sleep_forever()

        swarm.network.host("mute").serve(CHAIN_PROTOCOL, say_nothing)
        frames = await swarm.frames("a")
        await frames.send(msgspec.structs.replace(swarm.opening(), successor=Successor("mute")))
        refused = await refusal(frames)
        assert (refused.code, refused.peer_id) == ("successor_unreachable", "mute")


async def test_a_batch_that_cannot_be_computed_is_reported(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm(checkpoint) as swarm:

        def fail(chunks: object, span: object) -> list[Tensor]:
            raise RuntimeError("out of memory")

        session = await swarm.session()
        monkeypatch.setattr(swarm.runners["a"], "run", fail)
        with pytest.raises(PeerRefused, match="out of memory") as caught:
            await session.decode(hidden_states(1), 0)
        assert caught.value.code == "compute"
        await session.aclose()
        await swarm.all_closed()


async def test_an_operator_hears_of_sessions(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        session = await swarm.session(max_tokens=32)
        await session.prefill(hidden_states(6), 0)
        await session.aclose()
        await swarm.all_closed()
        opened, closed = swarm.events
        assert opened == SessionOpened("client", (0, 8), 32, 1)
        assert closed == SessionClosed("client", 6, "done", 0)


def chain_streams(swarm: Swarm, source: str, target: str) -> int:
    return sum((opener, answerer) == (source, target) for opener, answerer, _ in swarm.network.streams)


async def test_a_link_leaves_its_relay_in_the_middle_of_a_session(checkpoint: Checkpoint) -> None:
    hidden = hidden_states(40)
    expected = local_output(checkpoint, hidden)
    async with open_swarm(checkpoint, 3, 6) as swarm:
        swarm.network.relayed = {("a", "b"), ("b", "c")}
        session = await swarm.session()
        last = await session.prefill(hidden[:8], 0)
        torch.testing.assert_close(last, expected[7:8], atol=2e-4, rtol=1e-4)
        moved = 0
        for position in range(8, 40):
            if position == 12:
                swarm.network.relayed.clear()
            output = await session.decode(hidden[position : position + 1], position)
            torch.testing.assert_close(output, expected[position : position + 1], atol=2e-4, rtol=1e-4)
            if position == 20:
                while moved < 2:
                    await trio.sleep(0.01)
                    moved = sum(swarm.network.hosts[name].counts.total("upgrades") for name in ("a", "b"))
        assert (chain_streams(swarm, "a", "b"), chain_streams(swarm, "b", "c")) == (2, 2)
        assert session.failovers == 0
        await session.aclose()
        await swarm.all_closed()


def session_streams(swarm: Swarm, target: str) -> list[MemoryStream]:
    return [
        stream
        for source, answerer, stream in swarm.network.streams
        if source == "client" and answerer == target
    ]


async def test_the_clients_streams_leave_their_relays_in_the_middle_of_a_session(
    checkpoint: Checkpoint,
) -> None:
    hidden = hidden_states(40)
    expected = local_output(checkpoint, hidden)
    async with open_swarm(checkpoint, 3, 6) as swarm:
        swarm.network.relayed = {("client", "a"), ("client", "c")}
        session = await swarm.session()
        await session.prefill(hidden[:8], 0)
        for position in range(8, 40):
            if position == 12:
                swarm.network.relayed.clear()
            output = await session.decode(hidden[position : position + 1], position)
            torch.testing.assert_close(output, expected[position : position + 1], atol=2e-4, rtol=1e-4)
            if position == 20:
                while swarm.network.hosts["client"].counts.total("upgrades") < 2:
                    await trio.sleep(0.01)
            if position == 24:  # what they left may break now
                for target in "ac":
                    await session_streams(swarm, target)[0].reset()
                await trio.testing.wait_all_tasks_blocked(0.01)
        assert [len(session_streams(swarm, target)) for target in "abc"] == [2, 1, 2]
        assert session.failovers == 0
        await session.aclose()
        await swarm.all_closed()


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


async def test_a_link_that_cannot_be_made_anew_stays_on_its_relay(checkpoint: Checkpoint) -> None:
    hidden = hidden_states(12)
    expected = local_output(checkpoint, hidden)
    async with open_swarm(checkpoint, 3) as swarm:
        swarm.network.relayed = {("a", "b")}
        session = await swarm.session()
        await session.prefill(hidden[:8], 0)
        swarm.network.hosts["b"].stop_serving(CHAIN_PROTOCOL)
        swarm.network.relayed.clear()
        await trio.sleep(2 * LOOK_S)
        for position in range(8, 12):
            output = await session.decode(hidden[position : position + 1], position)
            torch.testing.assert_close(output, expected[position : position + 1], atol=2e-4, rtol=1e-4)
        assert swarm.network.hosts["a"].counts.total("upgrades") == 0
        assert session.failovers == 0
        await session.aclose()
        await swarm.all_closed()
