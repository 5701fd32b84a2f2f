"""Link of a hop to its successor: steps go out, acknowledgements and replay progress come back.

Replayed steps are the only ones that could pile up at the other side, since a log is sent as fast as it can
be read. So no more than a window of them are under way before the successor says that they are in place.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import trio

from p2pinfer.errors import PeerVanished, ProtocolViolation
from p2pinfer.node.concurrency.pulse import Pulse
from p2pinfer.node.transport.line_rate import Line

from .frames import FrameStream
from .messages import Alive, End, Filled, Probe, Step
from .replay_log import LoggedStep


class ReplayWindow:
    """Replayed steps in flight, for whoever feeds a hop: another hop, or the client."""

    def __init__(self) -> None:
        self._under_way = 0
        self._changed = Pulse()
        self._over = False

    @property
    def is_open(self) -> bool:
        """True if somebody waits for steps to be confirmed."""
        return self._under_way > 0

    async def enter(self, size: int) -> None:
        """Wait until fewer than `size` steps are under way, and be one of them.

        Raises:
            PeerVanished: The other side is gone.
        """
        await self._until(size - 1)
        self._under_way += 1

    async def drain(self) -> None:
        """Wait until every step is confirmed.

        Raises:
            PeerVanished: The other side is gone.
        """
        await self._until(0)

    def confirm(self) -> None:
        """One more step is in place."""
        self._under_way -= 1
        self._notify()

    def close(self) -> None:
        """Let nobody wait any more: nothing will be confirmed."""
        self._over = True
        self._notify()

    async def _until(self, most: int) -> None:
        while self._under_way > most and not self._over:
            await self._changed.wait()
        if self._over:
            raise PeerVanished("the peer that was being fed is gone")

    def _notify(self) -> None:
        self._changed.fire()


class Link:
    """The stream to a successor that let us attach. One task runs `watch`; `aclose` ends it.

    Attributes:
        send: Sends one step; raises PeerVanished if the successor is gone.
        send_now: Sends one if that takes no waiting; False, with nothing sent, if it does or cannot be done.
    """

    def __init__(
        self, frames: FrameStream, send_back: Callable[[Filled], Awaitable[None]], *, is_relayed: bool = False
    ) -> None:
        """`send_back` is given what confirms a replay that began further up."""
        self.peer_id = frames.peer_id
        self.is_relayed = is_relayed
        self.round_trip_s = 0.0  # until the successor had agreed; 0: not known
        self.send: Callable[[Step, bytes], Awaitable[None]] = frames.send
        self.send_now: Callable[[Step, bytes], bool] = frames.send_now
        self._frames = frames
        self._send_back = send_back
        self._window = ReplayWindow()
        self._awaited: dict[int, trio.Event] = {}
        self._probes = 0
        self.is_lost = False

    async def replay(self, pieces: Iterable[LoggedStep], *, hops: int, epoch: int, window: int) -> None:
        """Send what was logged, for `hops` hops to take in, no more than `window` steps ahead of them.

        Raises:
            PeerVanished: The successor is gone.
        """
        for number, sent in enumerate(pieces):
            await self._window.enter(window)
            step = Step(number, epoch, sent.position, sent.tokens, 0, replay=hops)
            try:
                await self._frames.send(step, sent.payload)
            except trio.Cancelled:
                self.is_lost = True  # half a step may have gone out
                raise

    async def all_filled(self) -> None:
        """Wait until everything replayed is in place.

        Raises:
            PeerVanished: The successor is gone.
        """
        await self._window.drain()

    @property
    def line(self) -> Line:
        """State of the line to the successor."""
        return self._frames.line

    async def is_there(self, within_s: float) -> bool:
        """True if the successor shows a sign of life in about that time, whatever is on its way to it."""
        if not self._frames.can_ping:
            return await self.probe(within_s)
        if self.is_lost or await self._frames.is_answered(within_s):
            return not self.is_lost
        # Else who links us to that peer again, at another address perhaps, would do so on this connection.
        await self._frames.hang_up()
        return False

    async def probe(self, within_s: float) -> bool:
        """True if the successor answers within so many seconds that it has read all that was sent."""
        number = self._probes
        self._probes += 1
        answered = self._awaited[number] = trio.Event()
        try:
            with trio.move_on_after(within_s) as patience:
                await self._frames.send(Probe(number))
                await answered.wait()
            return not (patience.cancelled_caught or self.is_lost)
        except PeerVanished:
            return False
        finally:
            del self._awaited[number]

    async def watch(self) -> None:
        """Read what comes back until the stream ends; returns when the successor said `End`.

        Raises:
            PeerVanished: The stream broke.
            ProtocolViolation: The successor said what it may not.
        """
        try:
            while True:
                message, _ = await self._frames.receive()
                match message:
                    case Alive():
                        if message.number in self._awaited:
                            self._awaited[message.number].set()
                    case Filled() if self._window.is_open:
                        self._window.confirm()
                    case Filled():
                        await self._send_back(message)
                    case End():
                        return
                    case _:
                        raise ProtocolViolation(f"{type(message).__name__} from a successor", self.peer_id)
        finally:
            self.is_lost = True
            self._window.close()
            for answered in self._awaited.values():
                answered.set()

    async def end(self) -> None:
        """Say that nothing follows, and hang up."""
        await self._frames.end()

    async def aclose(self) -> None:
        """Hang up at once: a successor that takes nothing in must not hold us up."""
        await self._frames.aclose()
