"""Neighbours of a session on this hop: predecessors, successor and client, and the streams to them.

The session's client, and nobody else, may change the neighbours while the session runs. Another predecessor
that it names takes over with its first own step (`predecessors`); the successor is replaced by `switch`.
Steps come on a predecessor's stream or the client's, go on to the successor on `link`, and are answered to
the client on `control`, which may move to another connection at any time.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import trio

from p2pinfer.errors import PeerVanished
from p2pinfer.node.concurrency.fast_lock import FastLock
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.link import Link
from p2pinfer.node.protocol.messages import (
    Filled,
    Leaving,
    Moved,
    Open,
    RefusalCode,
    Refused,
    Step,
    printable,
)

from .predecessors import Predecessors

_FAREWELL_S: Final = 1.0  # for the end of a stream that is used no more


class Neighbours:
    """Streams of one session, and what is said on them beside the outputs.

    Attributes:
        predecessors: The peers that may feed the session.
        feeder: The stream whose steps need no look at `predecessors`, because the last one needed it.
        control: The client's stream.
        reading: Around whoever reads `control`.
        link: To the successor; None on the last hop, before the successor is reached, and after it is lost.
        standby: To the peer that is to take the successor's place.
        pausing: Held while a step waits to go to the successor, and while none may go.
        least_epoch: Of steps that still go to the successor.
    """

    def __init__(self, opening: Open, client_id: str, control: FrameStream) -> None:
        self.predecessors = Predecessors(opening.predecessor or client_id)
        self.feeder: FrameStream | None = None
        self.control = control
        self.reading = trio.CancelScope()
        self.link: Link | None = None
        self.standby: Link | None = None
        self.pausing = FastLock()
        self.least_epoch = 0
        self._replayer: FrameStream | None = None  # where the last step with `replay` came from
        self._left = trio.Event()  # set when `control` is used no more

    # ------------------------------------------------------------------ who feeds us

    def takes_from(self, stream: FrameStream, *, is_replay: bool) -> bool:
        """True if a step that came on `stream` is to be taken in; may cut others off that have fed us."""
        peer_id = stream.peer_id
        if not self.predecessors.expects(peer_id):
            return False  # cut off, and what it had sent before still comes in
        if is_replay:
            self._replayer = stream
        else:
            self.predecessors.fed_by(peer_id)
            self.feeder = stream
        return True

    def expect(self, peer_id: str) -> None:
        """Let this peer feed the session too, as `Predecessors.expect` says."""
        self.predecessors.expect(peer_id)
        self.feeder = None  # whose next step may find that another one has taken over

    async def confirm_to(self, feeder: FrameStream, number: int) -> None:
        """Tell a peer that feeds us that a replayed step is where it was meant for."""
        with suppress(PeerVanished):  # whoever replays may be given up like anybody else
            await feeder.send(Filled(number))

    async def confirm_to_replayer(self, filled: Filled) -> None:
        """Tell whoever replayed through this hop that the hops behind have it all."""
        if self._replayer is not None:
            await self.confirm_to(self._replayer, filled.number)

    # ------------------------------------------------------------------ whom we feed

    async def send_to_successor(self, step: Step, payload: bytes) -> None:
        """Send a step on; without a link, or after a switch, it is dropped: the client will send it again.

        Raises:
            PeerVanished: The client is gone. A successor that is gone is reported to the client instead.
        """
        async with self.pausing:
            # Asked with the lock held: a switch may have come while this step waited, and an epoch must not
            # fall along a link. What is dropped here has no result, so the client sends it again.
            link = self.link
            if link is None or step.epoch < self.least_epoch:
                return
            try:
                await link.send(step, payload)
            except PeerVanished as exc:
                await self.lose(link, str(exc))

    def supersede(self, epoch: int) -> None:
        """Send on no outputs of epochs before this one any more."""
        self.least_epoch = max(self.least_epoch, epoch)

    def switch(self, link: Link, epoch: int) -> Link | None:
        """Have outputs of `epoch` and later go out on `link`, and no others; returns the former link."""
        former, self.link = self.link, link
        self.standby = None
        self.least_epoch = epoch
        return former

    async def lose(self, link: Link, why: str) -> None:
        """Do without a link that broke, and tell the client if steps were to go out on it.

        Raises:
            PeerVanished: The client is gone.
        """
        if link is self.standby:
            self.standby = None
        elif link is self.link:
            self.link = None
            await self.refuse("successor_vanished", f"the next hop is gone: {why}", link.peer_id)

    async def end_links(self) -> None:
        """Say to whom we feed, or were to feed, that nothing follows."""
        for link in (self.link, self.standby):
            if link is not None:
                with trio.CancelScope(shield=True), trio.move_on_after(_FAREWELL_S):
                    await link.end()

    # ------------------------------------------------------------------ the client

    async def refuse(self, code: RefusalCode, message: str, about_peer: str = "") -> None:
        """Tell the client, on its control stream, that the session cannot go on as it is.

        Raises:
            PeerVanished: The client is gone.
        """
        await self.control.send(Refused(code, printable(message), about_peer))

    async def say_leaving(self, seconds: float) -> None:
        """Tell the client that this hop is there for so many seconds more; quiet if the client is gone."""
        with suppress(PeerVanished):
            await self.control.send(Leaving(seconds))

    async def go_on_at(self, control: FrameStream) -> None:
        """Talk with the client on another stream of its; returns when that is used no more.

        Raises:
            PeerVanished: The new stream broke at once; the session is where it was.
        """
        await control.send(Moved())
        former, self.control = self.control, control
        self.reading.cancel()
        self.leave()
        left = self._left = trio.Event()
        with trio.move_on_after(_FAREWELL_S):
            await former.end()
        await left.wait()

    def leave(self) -> None:
        """Note that nothing will be said on `control` any more."""
        self._left.set()
