"""Stream from a client to one hop of its session.

One task reads the stream. Answers go to whoever asked; results, refusals and goodbyes to a listener. When the
stream ends, whoever waits for an answer is told why. A session can move to another stream, a direct one where
the first went through a relay: what follows is sent there, and read there once the hop has ended the former.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

import trio

from p2pinfer.errors import (
    PeerError,
    PeerRefused,
    PeerUnreachable,
    PeerVanished,
    ProtocolViolation,
)
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.link import ReplayWindow
from p2pinfer.node.protocol.messages import (
    Alive,
    End,
    Expect,
    Filled,
    Leaving,
    Message,
    Move,
    Moved,
    Opened,
    Probe,
    RefusalCode,
    Refused,
    Relink,
    Relinked,
    Result,
    Step,
    Successor,
)
from p2pinfer.node.transport.line_rate import Line
from p2pinfer.reputation.receipt import Payload
from p2pinfer.routing.route import Hop

from .flow_limits import FlowLimits

_FORMER_S: Final = 1.0  # for what is still to come on a stream that was left, lest that is dead
_SUCCESSORS_SHARE: Final = 0.8  # of the time for a sign of life, for one of the hop behind

AsSent: TypeAlias = Callable[[Step, Payload], Payload]


class Listener(Protocol):
    """Receiver of what hops say without having been asked."""

    def on_result(self, stream: HopStream, result: Result, payload: bytearray) -> None:
        """A step came out of the chain; may raise ProtocolViolation."""
        ...

    def on_refused(self, stream: HopStream, refused: Refused) -> None:
        """The hop cannot go on as it is."""
        ...

    def on_lost(self, stream: HopStream, error: PeerError) -> None:
        """The stream has ended, or what came on it cannot be believed."""
        ...

    def on_leaving(self, stream: HopStream, seconds: float) -> None:
        """The hop is there for so many seconds more."""
        ...


@dataclass(slots=True)
class _Answer:
    arrived: trio.Event = field(default_factory=trio.Event)
    problem: RefusalCode | None = None
    alive: Alive | None = None


class HopStream:
    """One hop that has opened the session. `watch` runs for as long as it is used."""

    def __init__(
        self,
        hop: Hop,
        opened: Opened,
        frames: FrameStream,
        *,
        is_relayed: bool = False,
        as_sent: AsSent = lambda _, payload: payload,
    ) -> None:
        """`as_sent` gives the payload of a step as it travels."""
        self.hop = hop
        self._as_sent = as_sent
        self.opened = opened
        self.is_relayed = is_relayed
        self.peer_id = hop.peer_id
        self.lost = trio.Event()
        self.error: PeerError | None = None  # why it is lost
        self._frames = frames  # to send on
        self._read_from = frames
        self._reading = trio.CancelScope()
        self._settled = trio.Event()  # whether the session moves or not
        self._settled.set()
        self._window = ReplayWindow()
        self._answers: dict[int, _Answer] = {}
        self._asked = 0
        self._uses: list[trio.CancelScope] = []
        self._given_up = False
        self._scope = trio.CancelScope()

    @property
    def line(self) -> Line:
        """State of the line to the hop."""
        return self._frames.line

    @property
    def sent_bytes(self) -> int:
        """Bytes sent to the hop on its present stream; it grows while a step goes out."""
        return self._frames.sent_bytes

    def send_now(self, step: Step, payload: Payload) -> bool:
        """Send a step if that takes no waiting; False, with nothing sent, if it does or cannot be done."""
        return not self._given_up and self._frames.send_now(step, self._as_sent(step, payload))

    async def send(self, step: Step, payload: Payload) -> None:
        """Send a step; of what the hop has kept, only its place.

        Raises:
            PeerVanished: The hop is gone.
        """
        await self._frames.send(step, self._as_sent(step, payload))

    @contextmanager
    def until_given_up(self, limit_s: float = math.inf) -> Generator[None]:
        """End what runs inside when the hop is given up, or the time is over.

        Raises:
            PeerVanished: It did.
        """
        with trio.CancelScope(relative_deadline=limit_s) as scope:
            if self._given_up:
                scope.cancel()
            self._uses.append(scope)
            try:
                yield
            finally:
                self._uses.remove(scope)
        if scope.cancelled_caught:
            why = "it was given up" if self._given_up else f"it took nothing in for {limit_s:g} s"
            raise PeerVanished(why, self.peer_id)

    def give_up(self) -> None:
        """Wait for the hop no more: it takes nothing in, or somebody else is to take its place."""
        self._given_up = True
        for scope in self._uses:
            scope.cancel()

    async def fill(self, step: Step, payload: Payload, window: int) -> None:
        """Send a step with `replay` as soon as fewer than `window` of them are not in place.

        Raises:
            PeerVanished: The hop is gone.
        """
        await self._window.enter(window)
        await self._frames.send(step, self._as_sent(step, payload))

    async def all_filled(self) -> None:
        """Wait until whatever was sent by `fill` is in place.

        Raises:
            PeerVanished: The hop is gone.
        """
        await self._window.drain()

    async def expect(self, predecessor: str) -> None:
        """Let another peer feed the hop as well.

        Raises:
            PeerVanished: The hop is gone.
        """
        await self._frames.send(Expect(predecessor))

    async def relink(
        self,
        successor: Hop,
        start: int,
        stop: int,
        *,
        replay: int,
        epoch: int,
        switch: bool,
        limits: FlowLimits | None = None,
    ) -> None:
        """Have the hop link to `successor` and replay `[start, stop)` to it; see `messages.Relink`.

        Raises:
            PeerRefused: The hop's log does not hold that; the code is `no_replay`, and the link stands.
            PeerError: The hop, or by its word the successor, is gone.
        """
        target = Successor(successor.peer_id, tuple(successor.addrs))
        limits = limits or FlowLimits(1, 1, 1, 1)
        number, answer = self._ask()
        relink = Relink(
            number, target, start, stop, replay, epoch, switch, limits.chunk_tokens, limits.chunks_in_flight
        )
        try:
            await self._frames.send(relink)
            await answer.arrived.wait()
        finally:
            del self._answers[number]
        if self.error is not None:
            raise self.error
        match answer.problem:
            case None:
                return
            case "no_replay":
                raise PeerRefused("its replay log does not reach that far", self.peer_id, "no_replay")
            case "successor_unreachable":
                raise PeerUnreachable(
                    "its predecessor could not reach it", successor.peer_id, told_by=self.peer_id
                )
            # The error names the successor on the word of the hop before it. `Failover` asks before it
            # believes that.
            case problem:
                raise PeerVanished(
                    f"its predecessor lost the connection to it: {problem}",
                    successor.peer_id,
                    told_by=self.peer_id,
                )

    async def probe(self, within_s: float, *, ask_successor: bool = True) -> Alive | None:
        """The hop's sign of life; None if there was none. `within_s` is for a line that takes no time.

        With `ask_successor` it also tells of its successor, which has most of that time. It is asked for both
        at once and answers one after the other: who has to wait for its successor is not taken for dead.
        """
        answers: list[Alive | None] = [None, None]
        limit_s = self.line.patience_s(within_s)

        async def ask(place: int, successor_s: float) -> None:
            if place == 0 and self._frames.can_ping:
                # On the stream the question would wait behind the very prompt that takes so long.
                is_there = not self.lost.is_set() and await self._frames.is_answered(within_s)
                answers[place] = Alive(0) if is_there else None
            else:
                answers[place] = await self._probe(limit_s, successor_s)
            # A hop that gives no sign of life itself is not waited for on behalf of its successor.
            if place == 0 and answers[0] is None:
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, 0, 0.0)
            if ask_successor:
                nursery.start_soon(ask, 1, within_s * _SUCCESSORS_SHARE)
        alive, of_successor = answers
        return alive and (of_successor or alive)

    async def _probe(self, within_s: float, successor_s: float) -> Alive | None:
        number, answer = self._ask()
        try:
            with trio.move_on_after(within_s):
                await self._frames.send(Probe(number, int(successor_s * 1e3)))
                await answer.arrived.wait()
        except PeerVanished:
            return None
        finally:
            del self._answers[number]
        return answer.alive

    async def hang_up(self) -> None:
        """End the connection to the hop, on which nothing comes: its address or ours may have changed."""
        await self._frames.hang_up()

    async def move(self, session: bytes, frames: FrameStream) -> None:
        """Go on with the session on another stream to the hop, which no step must be under way to.

        Raises:
            PeerError: The hop does not agree, or is gone; if it does not say so, the former stream tells.
        """
        self._settled = trio.Event()
        try:
            await frames.send(Move(session))
            match (await frames.receive())[0]:
                case Moved():
                    frames.max_payload_bytes = self._frames.max_payload_bytes
                    self._frames = frames
                    self._reading.deadline = trio.current_time() + _FORMER_S
                    self.is_relayed = False
                case other:
                    raise PeerRefused(f"answered {type(other).__name__}", self.peer_id, "no_session")
        finally:
            self._settled.set()

    async def watch(self, listener: Listener) -> None:
        """Read the stream to its end, and that which the session moves to after it."""
        try:
            with self._scope:
                while True:
                    error = await self._read_to_the_end(listener)
                    # The hop ends this stream when it has agreed to a move, and that may be read here before
                    # the agreement is read on the other stream. Only then is it known if this end is a loss.
                    await self._settled.wait()
                    if self._read_from is self._frames:
                        raise error
                    former, self._read_from = self._read_from, self._frames
                    await former.aclose()
        except PeerError as exc:
            self.error = exc
            listener.on_lost(self, exc)
        finally:
            # However it ended: nobody is left waiting for an answer that cannot come any more.
            self.error = self.error or PeerVanished("the session is closed", self.peer_id)
            self.lost.set()
            self._window.close()
            for answer in self._answers.values():
                answer.arrived.set()

    async def _read_to_the_end(self, listener: Listener) -> PeerError:
        """Hear what comes on a stream; returns how it ended, which is in order if the session has left it."""
        try:
            with trio.CancelScope() as self._reading:
                while True:
                    message, payload = await self._read_from.receive()
                    if isinstance(message, End):
                        break
                    self._hear(listener, message, payload)
        except PeerVanished as exc:
            return exc
        return ProtocolViolation("End in the middle of a session", self.peer_id)

    def _hear(self, listener: Listener, message: Message, payload: bytearray) -> None:
        match message:
            case Result():
                listener.on_result(self, message, payload)
            case Filled() if self._window.is_open:
                self._window.confirm()
            case Relinked() | Alive():
                self._answer(message)
            case Leaving():
                listener.on_leaving(self, message.seconds)
            case Refused():
                listener.on_refused(self, message)
            case _:
                raise ProtocolViolation(f"{type(message).__name__} in the middle of a session", self.peer_id)

    async def end(self, *, keep: bool = False) -> None:
        """Say that the session is over here, and if its cache is to be kept; quiet if the hop is gone."""
        self._scope.cancel()
        if self._read_from is not self._frames:  # left, and not read to its end yet
            await self._read_from.aclose()
        await self._frames.end(keep=keep)

    def _ask(self) -> tuple[int, _Answer]:
        number = self._asked
        self._asked += 1
        answer = self._answers[number] = _Answer()
        if self.lost.is_set():
            answer.arrived.set()
        return number, answer

    def _answer(self, message: Relinked | Alive) -> None:
        answer = self._answers.get(message.number)
        if answer is None:
            return  # we have given up waiting for it
        if isinstance(message, Alive):
            answer.alive = message
        else:
            answer.problem = message.problem
        answer.arrived.set()
