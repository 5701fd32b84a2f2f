"""One session on one hop: steps come in, are computed in order, and go on to the successor.

    predecessor ──Step──> accept ──Job──> worker ──Done──> outbox ──Step/Result──> successor or client

`accept` runs in the task that reads the predecessor's stream and never waits. The worker's answer lands in
the outbox, and one task sends. So reading, computing and sending of successive steps overlap, and a chunked
prompt keeps every hop of a route at work. What is between `accept` and the outbox's end is in flight, and
bounded: a peer that sends more than it may is cut off rather than read slowly, because a reader that pauses
for seconds makes libp2p kill the connection under everybody.

The session's client, and nobody else, may change the neighbours while the session runs: `predecessors` are
told to expect another peer, `switch` has the outputs go elsewhere. Steps with `replay` come from somebody's
log and stop here or a few hops on; what they leave behind is the cache and the log of a session that never
broke.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import msgspec
import trio
from torch import Tensor

from p2pinfer.errors import PeerVanished, ProtocolViolation, WrongOutput
from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.models.compute.runner import Chunk
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.concurrency.fast_lock import FastLock
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.evidence.store import EvidenceStore
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.link import Link
from p2pinfer.node.protocol.messages import (
    Bill,
    Filled,
    Leaving,
    Moved,
    Open,
    RefusalCode,
    Refused,
    Result,
    Step,
    printable,
)
from p2pinfer.node.protocol.replay_log import ReplayLog
from p2pinfer.node.protocol.tensors import check_finite, encode_hidden, view_hidden

from .predecessors import Predecessors
from .receipt_signer import ReceiptSigner
from .worker import Done, Job, Worker

_FAREWELL_S: Final = 1.0  # for the end of a stream that the client has left


class SessionRefusal(Exception):
    """Why a session is not let in, or cannot go on; travels to the client as `Refused`."""

    def __init__(self, code: RefusalCode, message: str, about_peer: str = "", *, fits: int = 0) -> None:
        super().__init__(message)
        self.code: RefusalCode = code
        self.about_peer = about_peer
        self.fits = fits  # tokens of a session that would be let in


@dataclass(frozen=True, slots=True)
class _Output:
    """A computed step on its way out."""

    step: Step
    received: bytearray
    done: Done
    arrived_at: float
    feeder: FrameStream  # where the step came from


class HopSession:
    """The state of one session on this hop, from its admission to its end.

    `opening` is what the client asked for; `lease` and `replay` are its reservations, which `close` gives
    back. Outputs go out on `link`; on the last hop they return to the client on `control`. `link` is None
    there, before the successor is reached, and after it is lost; `standby` is to take its place.
    """

    def __init__(
        self,
        opening: Open,
        client_id: str,
        control: FrameStream,
        *,
        hidden_size: int,
        lease: CacheLease,
        replay: ReplayLog | None,
        worker: Worker,
        config: ServeConfig,
        notary: ReceiptSigner,
        evidence: EvidenceStore,
    ) -> None:
        self.opening = opening
        self.client_id = client_id
        self.control = control
        self.predecessors = Predecessors(opening.predecessor or client_id)
        self.reading = trio.CancelScope()  # around whoever reads `control`
        self.link: Link | None = None
        self.standby: Link | None = None
        self.pausing = FastLock()  # held while a step is sent on, and while none may be
        self.ended_by: SessionRefusal | None = None
        self.tokens_computed = 0
        self.last_active = trio.current_time()
        self._hidden_size = hidden_size
        self._span = BlockSpan(opening.start, opening.stop)
        self._lease = lease
        self.replay = replay
        self._worker = worker
        self._config = config
        self._notary = notary
        self._evidence = evidence
        self._epoch = 0
        self._least_epoch = 0  # of steps that are still sent on
        self._expected_position = 0  # where the next step may begin at the latest
        self._replayer: FrameStream | None = None  # where the last step with `replay` came from
        self._in_flight = 0
        self._bytes_in_flight = 0
        self._rollbacks: list[tuple[int, int]] = []  # (epoch, position) of steps that superseded others
        self._is_spoilt = False  # a step came whose values are not finite
        self._ended = False
        self._closed = False
        self._left = trio.Event()  # set when `control` is used no more
        self._scopes: list[trio.CancelScope] = []
        self._outbox_in, self._outbox_out = trio.open_memory_channel[_Output](config.max_steps_in_flight)

    def accept(self, step: Step, payload: bytearray, feeder: FrameStream) -> None:
        """Check a step that came on the stream `feeder` and hand it to the worker.

        Raises:
            ProtocolViolation: The step does not follow from the ones before, or is larger than agreed.
        """
        arrived_at = time.perf_counter()
        peer_id = feeder.peer_id
        if not self.predecessors.expects(peer_id):
            return  # cut off, and what it had sent before still comes in
        self._check(step, len(payload), peer_id)
        hidden = view_hidden(payload, step.tokens, self._hidden_size, self.opening.codec, peer_id)
        if step.replay:
            self._replayer = feeder
        else:
            self.predecessors.fed_by(peer_id)
        if step.epoch > self._epoch:
            # Steps finish in order, so those that no step in flight has brought concern nobody any more.
            latest = self._rollbacks[1 - self._config.max_steps_in_flight :]
            self._rollbacks = [*latest, (step.epoch, step.position)]
        self._epoch = step.epoch
        self._expected_position = step.position + step.tokens
        self._in_flight += 1
        self._bytes_in_flight += len(payload)
        self.last_active = trio.current_time()
        self._worker.submit(
            Job(
                Chunk(self._lease, step.position, hidden),
                self._span,
                is_stale=lambda: self._is_superseded(step),
                on_done=lambda done: self._on_done(_Output(step, payload, done, arrived_at, feeder)),
                submitted_at=arrived_at,
                client=self.client_id,
                check=lambda: self._check_values(payload, peer_id),
                encode=lambda output: self._encode(step, output),
            )
        )

    @property
    def reserved_tokens(self) -> int:
        """Tokens of the cache that are kept for this session."""
        return self._lease.max_tokens

    @property
    def reserved_replay_bytes(self) -> int:
        """Bytes of the replay log that are kept for this session."""
        return self.replay.reserved_bytes if self.replay is not None else 0

    def _check(self, step: Step, payload_bytes: int, peer: str) -> None:
        if step.epoch < self._epoch:
            raise ProtocolViolation(f"step {step.number} is of epoch {step.epoch} after {self._epoch}", peer)
        if step.position > self._expected_position:
            raise ProtocolViolation(
                f"step {step.number} begins at {step.position}, not at {self._expected_position}",
                peer,
            )
        if step.position + step.tokens > self.opening.max_tokens:
            raise ProtocolViolation(
                f"step {step.number} ends at {step.position + step.tokens}, "
                f"past the {self.opening.max_tokens} tokens reserved",
                peer,
            )
        if step.tokens > self._config.max_chunk_tokens or step.returns > step.tokens:
            raise ProtocolViolation(f"step {step.number} of {step.tokens} tokens is too long", peer)
        if self._in_flight >= self._config.max_steps_in_flight:
            raise ProtocolViolation(f"more than {self._config.max_steps_in_flight} steps in flight", peer)
        if self._bytes_in_flight + payload_bytes > self._config.max_bytes_in_flight:
            raise ProtocolViolation(f"more than {self._config.max_bytes_in_flight} bytes in flight", peer)

    def _check_values(self, payload: bytearray, peer: str) -> None:
        """In the worker's thread: what is not finite must not reach the cache, nor may what follows."""
        try:
            check_finite(payload, self.opening.codec, peer)
        except WrongOutput:
            self._is_spoilt = True
            raise

    def _encode(self, step: Step, output: Tensor) -> bytes:
        """What of a step's output goes out, as it travels; called in the worker's thread."""
        rows = output[len(output) - step.returns :] if self.opening.successor is None else output
        return encode_hidden(rows, self.opening.codec)

    def _is_superseded(self, step: Step) -> bool:
        """Asked in the worker's thread, while the event loop at most replaces what it reads."""
        return (
            self._ended
            or self._closed
            or self._is_spoilt
            or any(step.epoch < epoch and step.position >= position for epoch, position in self._rollbacks)
        )

    def _on_done(self, output: _Output) -> None:
        if isinstance(output.done.error, WrongOutput):
            self.end(SessionRefusal("wrong_input", str(output.done.error), output.done.error.peer_id))
        elif output.done.error is not None:
            self.end(SessionRefusal("compute", f"step {output.step.number} failed: {output.done.error}"))
        elif not self._closed:
            self._outbox_in.send_nowait(output)  # never full: `_check` bounds what is in flight

    async def forward(self) -> None:
        """Send what is computed, in order, until cancelled.

        Raises:
            PeerVanished: The client is gone. A successor that is gone is reported to the client instead.
        """
        async for output in self._outbox_out:
            if output.done.output is not None:
                await self._send_on(output, output.done.payload)
            self._in_flight -= 1
            self._bytes_in_flight -= len(output.received)
            if not self._in_flight:
                self._rollbacks = []

    async def _send_on(self, output: _Output, payload: bytes) -> None:
        step = output.step
        self.tokens_computed += step.tokens
        self.last_active = trio.current_time()
        successor = self.opening.successor
        returned = step.returns if successor is None else step.tokens
        receipts = (*step.receipts, await self._attest(output, payload, returned))
        bills = (*step.bills, self._bill(output))
        if self.replay is not None:
            self.replay.append(step.position, step.tokens, payload)
        if step.replay == 1 or (step.replay and successor is None):
            await self._confirm(output.feeder, step.number)
        elif successor is None:
            result = Result(step.number, step.epoch, step.returns, bills, receipts)
            await self.control.send(result, payload)
        else:
            replay = max(0, step.replay - 1)
            await self._pass(
                msgspec.structs.replace(step, bills=bills, receipts=receipts, replay=replay), payload
            )

    async def _pass(self, step: Step, payload: bytes) -> None:
        """Send a step to the successor; without one, or after a switch, the client will send it again."""
        async with self.pausing:
            link = self.link
            if link is None or step.epoch < self._least_epoch:
                return
            try:
                await link.send(step, payload)
            except PeerVanished as exc:
                await self.lose(link, str(exc))

    async def _confirm(self, feeder: FrameStream, number: int) -> None:
        with suppress(PeerVanished):  # whoever replays may be given up like anybody else
            await feeder.send(Filled(number))

    async def pass_on(self, filled: Filled) -> None:
        """Tell whoever replayed through this hop that the hops behind have it all."""
        if self._replayer is not None:
            await self._confirm(self._replayer, filled.number)

    def supersede(self, epoch: int) -> None:
        """Send on no outputs of epochs before this one any more."""
        self._least_epoch = max(self._least_epoch, epoch)

    def switch(self, link: Link, epoch: int) -> Link | None:
        """Have outputs of `epoch` and later go out on `link`, and no others; returns the former link."""
        former, self.link = self.link, link
        self.standby = None
        self._least_epoch = epoch
        return former

    def move(self, link: Link) -> None:
        """Have outputs go out on another link to the same peer, which has all that went out before."""
        self.link = link

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

    async def _attest(self, output: _Output, payload: bytes, returned: int) -> bytes:
        """Our receipt for a step; what it names is kept for whoever may want to check it."""
        if output.feeder is not self.control:
            self._notary.predecessor = output.feeder.peer_id
        signed = await self._notary.attest(output.step, output.received, payload, returned)
        contents = (
            (signed.receipt_digest, signed.receipt),
            (signed.input_digest, output.received),
            (signed.output_digest, payload),
        )
        self._evidence.add(self.opening.session, contents, trio.current_time())
        return signed.receipt

    def _bill(self, output: _Output) -> Bill:
        done = output.done
        spent = time.perf_counter() - output.arrived_at
        return Bill(_us(done.queue_s), _us(done.compute_s), _us(spent), done.batch_tokens)

    async def refuse(self, code: RefusalCode, message: str, about_peer: str = "") -> None:
        """Tell the client, on its control stream, that the session cannot go on as it is.

        Raises:
            PeerVanished: The client is gone.
        """
        await self.control.send(Refused(code, printable(message), about_peer))

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
        """Nothing will be said on `control` any more."""
        self._left.set()

    async def say_leaving(self, seconds: float) -> None:
        """Tell the client that this hop is there for so many seconds more; quiet if the client is gone."""
        with suppress(PeerVanished):
            await self.control.send(Leaving(seconds))

    @contextmanager
    def scope(self) -> Generator[None]:
        """Whatever runs inside is cancelled by `end`."""
        with trio.CancelScope() as scope:
            if self._ended:
                scope.cancel()
            self._scopes.append(scope)
            try:
                yield
            finally:
                self._scopes.remove(scope)

    def end(self, refusal: SessionRefusal | None) -> None:
        """Stop everything that runs for this session; the first reason given counts, None is a quiet end."""
        if self._ended:
            return
        self._ended = True
        self.ended_by = refusal
        for scope in [*self._scopes]:
            scope.cancel()

    def close(self) -> None:
        """Give back every reservation. Steps still queued are dropped unread; harmless twice."""
        if self._closed:
            return
        self._closed = True
        self._outbox_in.close()
        self._worker.release(self._lease)
        if self.replay is not None:
            self.replay.release()


def _us(seconds: float) -> int:
    return max(0, int(seconds * 1e6))
