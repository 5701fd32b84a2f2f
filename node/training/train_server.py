"""Server of training: which clients may have passes of this node's blocks computed, and how many at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import aclosing
from typing import Final

import trio

from p2pinfer.errors import ProtocolViolation
from p2pinfer.models.learning.span_passes import SpanPasses
from p2pinfer.models.machine.memory import free_memory
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.frames import MinimumRate
from p2pinfer.node.protocol.messages import printable
from p2pinfer.node.protocol.train_messages import TRAIN_PROTOCOL, Begin, Begun, Declined
from p2pinfer.node.protocol.train_receipt import TrainSigner
from p2pinfer.node.protocol.train_stream import TrainStream
from p2pinfer.node.serve.forward import ServedSpan
from p2pinfer.node.transport.peer_stream import PeerStream

from .kept_inputs import KeptInputs
from .train_session import Decline, TrainSession, largest_payload
from .train_work import Passing

logger = logging.getLogger(__name__)

_KEPT_BYTES: Final = 1 << 30  # on a CPU, whose memory is for other things as well
_FAREWELL_S: Final = 1.0  # for a last word to a peer that may not listen


class TrainServer:
    """Serves passes of one span to a bounded number of clients. Call `register` once the span is loaded."""

    def __init__(
        self,
        host: Network,
        served: ServedSpan,
        config: ServeConfig,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Set up; nobody is answered before `register`. `on_change` is told when a session ends or begins."""
        self._host = host
        self._served = served
        self._config = config
        self._on_change = on_change
        self._passes = SpanPasses(*served.runner.parts)
        self._kept = KeptInputs(self._room())
        self._sessions: set[TrainSession] = set()
        self._leaving = False
        self._minimum_rate = MinimumRate(config.frame_timeout_s, config.min_bytes_per_s)

    def _room(self) -> int:
        """Bytes that may be kept for backward passes, by what is free at the moment."""
        on_card = self._passes.card_free_bytes
        asked = self._config.train_bytes or (_KEPT_BYTES if on_card is None else on_card // 4)
        return min(asked, free_memory().bytes // 4) if on_card is None else asked

    @property
    def sessions(self) -> int:
        """Number of open sessions."""
        return len(self._sessions)

    @property
    def kept_bytes(self) -> int:
        """Bytes of inputs that are kept for backward passes."""
        return self._kept.held_bytes

    def register(self) -> None:
        """Answer the protocol from now on."""
        self._host.serve(TRAIN_PROTOCOL, self._answer, is_metered=False)

    def unregister(self) -> None:
        """Answer no more streams; those that are open stay."""
        self._host.stop_serving(TRAIN_PROTOCOL)

    def refuse_newcomers(self) -> None:
        """Decline sessions and passes to come; what is computed is still answered, and clients move on."""
        self._leaving = True
        for session in self._sessions:
            session.leaving = True

    async def _answer(self, stream: PeerStream) -> None:
        frames = TrainStream(
            stream, max_payload_bytes=0, peer_id=stream.peer_id, minimum_rate=self._minimum_rate
        )
        async with aclosing(stream):
            try:
                await self._serve(frames, stream)
            except Decline as exc:
                logger.debug("training.declined peer=%s code=%s why=%s", stream.peer_id, exc.code, exc)
                self._host.counts.add("refusals", exc.code)
                with trio.move_on_after(_FAREWELL_S):
                    await frames.send(Declined(exc.code, printable(str(exc))))
            with trio.move_on_after(_FAREWELL_S):
                await frames.finish()

    async def _serve(self, frames: TrainStream, stream: PeerStream) -> None:
        begin = await self._first_message(frames)
        self._check(begin, stream)
        config, runner, client = self._config, self._served.runner, stream.peer_id
        passing = Passing(
            self._passes,
            BlockSpan(begin.start, begin.stop),
            begin.codec,
            client,
            self._served.worker,
            config.train_slice_s,
            runner.claim_thread,
        )
        signer = TrainSigner(begin, runner.numerics, self._host.sign)
        session = TrainSession(passing, frames, signer, self._kept, self._served.adapters, config)
        frames.max_payload_bytes = largest_payload(self._served.spec.hidden_size, config)
        if not self._sessions:
            self._kept.max_bytes = self._room()
            self._passes.keep_transposed(min(config.train_weight_bytes, free_memory().bytes // 4))
        self._sessions.add(session)
        self._on_change()
        logger.info("client %s trains through blocks %s", client, passing.span)
        try:
            await frames.send(
                Begun(
                    str(runner.numerics),
                    config.train_tokens,
                    config.train_in_flight,
                    config.client_adapter_bytes,
                    config.max_adapter_rank,
                )
            )
            await session.run()
        finally:
            self._sessions.discard(session)
            if not self._sessions:
                self._passes.keep_transposed(0)
            logger.info("client %s has ended its training after %s tokens", client, session.tokens)
            self._on_change()

    def _check(self, begin: Begin, stream: PeerStream) -> None:
        """Nothing, if the client may train.

        Raises:
            Decline: It may not, or not now.
        """
        served, span = self._served, self._served.runner.span
        if why := self._host.gate.refuses(stream.peer_id, "clients"):
            raise Decline("not_admitted", f"this node does not serve client {stream.peer_id}: {why}")
        if self._leaving:
            raise Decline("leaving", "this node is shutting down")
        if begin.revision != served.spec.revision:
            raise Decline("wrong_model", f"this node serves {served.spec.model} ({served.spec.revision})")
        if not span.start <= begin.start < begin.stop <= span.stop:
            raise Decline("wrong_span", f"this node holds blocks {span}")
        if len(self._sessions) >= self._config.max_train_sessions:
            raise Decline("busy", f"{len(self._sessions)} clients train here, which is the limit")
        of_client = sum(each.client_id == stream.peer_id for each in self._sessions)
        if of_client >= self._config.max_train_sessions_per_client:
            raise Decline("busy", f"{of_client} sessions of yours train here, which is the limit")

    async def _first_message(self, frames: TrainStream) -> Begin:
        with trio.move_on_after(self._config.handshake_timeout_s):
            message, _ = await frames.receive()
            if not isinstance(message, Begin):
                raise ProtocolViolation(
                    f"a stream of training begins with {type(message).__name__}", frames.peer_id
                )
            return message
        raise ProtocolViolation("opened a stream and said nothing", frames.peer_id)
