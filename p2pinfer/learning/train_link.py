"""Link to one hop: its adapters are kept up to date, and its answers are checked before they count."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias, TypeVar

import trio
from torch import Tensor

from p2pinfer.errors import PeerError, PeerRefused, PeerVanished, ProtocolViolation
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.numerics import Codec, row_bytes
from p2pinfer.models.verify.pass_figures import pass_figures
from p2pinfer.node.evidence.pass_record import PassRecord
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.span_adapter import SpanAdapter
from p2pinfer.node.protocol.train_messages import (
    Adapt,
    Adapted,
    Backward,
    Backwarded,
    Begin,
    Begun,
    Declined,
    Done,
    Forget,
    Forward,
    Forwarded,
    TrainMessage,
)
from p2pinfer.node.protocol.train_stream import FirstPart, TrainStream
from p2pinfer.node.protocol.train_tensors import decode_values, decode_vector
from p2pinfer.reputation.receipt import digest_of
from p2pinfer.reputation.train_receipt import NOTHING
from p2pinfer.routing.route import Hop

from .pass_receipts import Call, Expected, PassReceipts, record_of
from .pass_watch import PassWatch

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer", Adapted, Forwarded, Backwarded)
_Checked = TypeVar("_Checked")

HELD_ADAPTERS: Final = 2  # that a hop keeps
SIGN_OF_LIFE_S: Final = 5.0  # without an answer, after which a hop is asked if it is there
PATIENCE_S: Final = 10.0  # for its answer to that
BUSY_PAUSE_S: Final = 0.25  # before a hop that has no room is asked again; twice as long each time
BUSY_TIMES: Final = 6
_Noted: TypeAlias = tuple[PassRecord, Mapping[str, float]] | None  # a pass, for whoever watches


class _Pending:
    """A request without an answer, or with the first part of one."""

    def __init__(self, first: FirstPart | None) -> None:
        self.first = first
        self.answered = trio.Event()
        self.answer: tuple[TrainMessage, bytearray] | None = None


class TrainLink:
    """A session of training on one hop, as `open_link` makes it; `read` has to run for as long as it is used.

    Attributes:
        hop: The peer, and the blocks that it may be asked for.
        codec: How hidden states and gradients travel to it and back.
        limits: What it takes.
        failure: Why it can be used no more.
    """

    def __init__(
        self,
        hop: Hop,
        spec: ModelSpec,
        begin: Begin,
        limits: Begun,
        frames: TrainStream,
        host: Network,
        watch: PassWatch | None = None,
    ) -> None:
        self.hop = hop
        self.codec: Codec = begin.codec
        self.limits = limits
        self.failure: PeerError | None = None
        self._spec = spec
        self._begin = begin
        self._frames = frames
        self._host = host
        self._watch = watch
        self._pending: dict[int, _Pending] = {}
        self._last_number = 0
        self._room = trio.CapacityLimiter(limits.max_in_flight)
        self._adapters: OrderedDict[bytes, None] = OrderedDict()  # that the hop holds
        self._adapting = trio.Lock()
        self._receipts = PassReceipts(hop.peer_id, begin, limits.dtype, host)

    # ------------------------------------------------------------------ passes

    async def forward(self, call: Call, *, keeps: bool) -> tuple[int, Tensor]:
        """The pass's number at this hop, and the hidden states after the blocks, in the session's codec.

        Raises:
            PeerError: The hop is gone, refused, or what it sent is wrong.
        """
        digest = None if call.adapter is None else call.adapter.digest

        def request(number: int) -> Forward:
            span = call.span
            return Forward(number, span.start, span.stop, call.rows.lengths, digest, call.seed, keeps)

        answer, payload, number = await self._pass(call, request, Forwarded, (call.inputs,))
        tokens, size = call.rows.tokens, self._spec.hidden_size

        def checked() -> tuple[Tensor, _Noted]:
            expected = Expected("forward", call, False, digest_of(payload), NOTHING)
            receipt = self._receipts.check(answer.receipt, expected)
            output = decode_values(payload, tokens, size, self._begin.codec, self.hop.peer_id)
            if self._watch is None:
                return output, None
            record = record_of(self.hop.peer_id, answer.receipt, receipt, expected, b"", payload)
            return output, (record, pass_figures(call.hidden(self._begin.codec), output, None))

        output, noted = await self._check(checked)
        self._note(noted)
        return number, output

    async def backward(
        self,
        call: Call,
        forward: int | None,
        gradient: bytes,
        *,
        wants_hidden: bool,
        first: FirstPart | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the hop's input and of its part of the adapter.

        Args:
            forward: Number of the forward pass; None if the hop keeps nothing of it.
            first: Of the answer, which is settled as soon as it is here, and is not checked: see `hidden_of`.

        Raises:
            PeerError: As for `forward`.
        """
        try:
            return await self._backward(call, forward, gradient, first, wants_hidden=wants_hidden)
        except PeerRefused as exc:
            if exc.code != "inputs_gone":
                raise
        return await self._backward(call, None, gradient, first, wants_hidden=wants_hidden)

    def hidden_bytes(self, tokens: int) -> int:
        """Size of so many hidden states, or of their gradient, with which an answer begins."""
        return tokens * row_bytes(self._spec.hidden_size, self.codec)

    def hidden_of(self, content: bytearray) -> Tensor:
        """Hidden states or their gradient, (tokens, hidden_size), as this hop sends them.

        Raises:
            PeerError: They are not finite.
        """
        size = self._spec.hidden_size
        tokens = len(content) // row_bytes(size, self.codec)
        return decode_values(content, tokens, size, self.codec, self.hop.peer_id)

    async def _backward(
        self,
        call: Call,
        forward: int | None,
        gradient: bytes,
        first: FirstPart | None,
        *,
        wants_hidden: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        digest, resends = None if call.adapter is None else call.adapter.digest, forward is None

        def request(number: int) -> Backward:
            return Backward(
                number,
                forward or 0,
                call.span.start,
                call.span.stop,
                call.rows.lengths,
                digest,
                call.seed,
                resends,
                wants_hidden,
            )

        parts = (call.inputs, gradient) if resends else (gradient,)
        answer, payload, _ = await self._pass(call, request, Backwarded, parts, first)
        tokens, codec, peer_id = call.rows.tokens, self._begin.codec, self.hop.peer_id
        values = 0 if call.adapter is None else len(call.adapter.payload) // 4

        def checked() -> tuple[Tensor | None, Tensor | None, _Noted]:
            expected = Expected("backward", call, wants_hidden, digest_of(payload), digest_of(gradient))
            receipt = self._receipts.check(answer.receipt, expected)
            size = self.hidden_bytes(tokens) if wants_hidden else 0
            hidden = self.hidden_of(payload[:size]) if wants_hidden else None
            vector = decode_vector(payload[size:], values, peer_id)
            noted: _Noted = None
            if self._watch is not None:
                record = record_of(peer_id, answer.receipt, receipt, expected, gradient, payload)
                given = decode_values(bytearray(gradient), tokens, self._spec.hidden_size, codec)
                noted = (record, pass_figures(given, hidden, vector))
            return hidden, None if call.adapter is None else vector, noted

        hidden, vector, noted = await self._check(checked)
        self._note(noted)
        return hidden, vector

    def _note(self, noted: _Noted) -> None:
        if self._watch is not None and noted is not None:
            self._watch.passed(*noted)

    async def forget(self, forward: int) -> None:
        """Tell the hop that there will be no backward pass; quiet if it is gone."""
        try:
            if self.failure is None:
                await self._frames.send(Forget(forward))
        except PeerError as exc:
            self.give_up(exc)

    async def _pass(
        self,
        call: Call,
        request: Callable[[int], TrainMessage],
        kind: type[_Answer],
        payload: tuple[bytes, ...],
        first: FirstPart | None = None,
    ) -> tuple[_Answer, bytearray, int]:
        """Have a pass done, its adapter sent before if the hop lacks it; waits while the hop is full."""
        pause_s, times = BUSY_PAUSE_S, 0
        while True:
            await self.hold(call.adapter)
            try:
                return await self._ask(request, kind, payload, first)
            except PeerRefused as exc:
                if exc.code == "adapter_gone" and call.adapter is not None and times < BUSY_TIMES:
                    self._adapters.pop(call.adapter.digest, None)
                elif exc.code != "busy" or times >= BUSY_TIMES:
                    raise
                else:
                    await trio.sleep(pause_s)
                    pause_s *= 2
                times += 1

    async def hold(self, adapter: SpanAdapter | None) -> None:
        """Have the hop hold an adapter; raises as `forward` does."""
        if adapter is None:
            return
        async with self._adapting:
            if adapter.digest not in self._adapters:
                if len(adapter.payload) > self.limits.max_adapter_bytes:
                    raise PeerRefused(
                        f"peer {self.hop.peer_id} takes adapters of {self.limits.max_adapter_bytes} bytes; "
                        f"this one has {len(adapter.payload)} for blocks {self.hop.span}",
                        self.hop.peer_id,
                        "too_large",
                    )

                def request(number: int) -> Adapt:
                    return Adapt(number, adapter.digest, adapter.updates, adapter.prompt_tokens)

                await self._ask(request, Adapted, (adapter.payload,))
                self._adapters[adapter.digest] = None
                while len(self._adapters) > HELD_ADAPTERS:
                    self._adapters.popitem(last=False)

    # ------------------------------------------------------------------ requests and answers

    async def _ask(
        self,
        request: Callable[[int], TrainMessage],
        kind: type[_Answer],
        payload: tuple[bytes, ...],
        first: FirstPart | None = None,
    ) -> tuple[_Answer, bytearray, int]:
        async with self._room:
            self._check_open()
            self._last_number += 1
            number = self._last_number
            pending = self._pending[number] = _Pending(first)
            try:
                await self._frames.send(request(number), *payload)
                answer, received = await self._wait(pending)
            except (PeerVanished, ProtocolViolation) as exc:
                self.give_up(exc)
                raise
            finally:
                self._pending.pop(number, None)
        if isinstance(answer, Declined):
            if answer.code == "leaving":
                self.give_up(PeerVanished(f"peer {self.hop.peer_id} is leaving", self.hop.peer_id))
            raise PeerRefused(
                f"peer {self.hop.peer_id} declined a pass of blocks {self.hop.span}: {answer.message}",
                self.hop.peer_id,
                answer.code,
            )
        if not isinstance(answer, kind):
            wrong = ProtocolViolation(f"{type(answer).__name__} as an answer", self.hop.peer_id)
            self.give_up(wrong)
            raise wrong
        return answer, received, number

    async def _wait(self, pending: _Pending) -> tuple[TrainMessage, bytearray]:
        """The answer; asks for a sign of life while there is none."""
        while not pending.answered.is_set():
            with trio.move_on_after(SIGN_OF_LIFE_S):
                await pending.answered.wait()
            if not pending.answered.is_set():
                with self._host.within(PATIENCE_S, [self.hop.peer_id], 4) as scope:
                    await self._host.ping(self.hop.peer_id)
                if scope.cancelled_caught:
                    raise PeerVanished(f"peer {self.hop.peer_id} does not answer", self.hop.peer_id)
        if pending.answer is None:
            self._check_open()
            raise PeerVanished("the stream ended", self.hop.peer_id)
        return pending.answer

    async def _check(self, checked: Callable[[], _Checked]) -> _Checked:
        """Result of a check, in a thread; a wrong answer is the last one that is taken from this hop."""
        try:
            return await trio.to_thread.run_sync(checked)
        except PeerError as exc:
            self.give_up(exc)
            raise

    async def read(self) -> None:
        """Take in answers until the session ends."""
        try:
            while True:
                message, payload = await self._frames.receive(self._first_part)
                if isinstance(message, Done):
                    raise PeerVanished("the hop ended the session", self.hop.peer_id)
                number = getattr(message, "number", None)
                if isinstance(message, Declined) and number is None:
                    raise PeerRefused(
                        f"peer {self.hop.peer_id} ended the training: {message.message}",
                        self.hop.peer_id,
                        message.code,
                    )
                pending = self._pending.get(number) if number is not None else None
                if pending is None or pending.answered.is_set():
                    raise ProtocolViolation("an answer that nothing was asked for", self.hop.peer_id)
                pending.answer = (message, payload)
                pending.answered.set()
        except PeerError as exc:
            self.give_up(exc)

    def _first_part(self, message: TrainMessage) -> FirstPart | None:
        pending = self._pending.get(message.number) if isinstance(message, Backwarded) else None
        return None if pending is None else pending.first

    async def close(self) -> None:
        """End the session; quiet if the hop is gone."""
        with trio.move_on_after(1.0):
            await self._frames.finish()

    def _check_open(self) -> None:
        if self.failure is not None:
            raise type(self.failure)(str(self.failure), self.hop.peer_id)

    def give_up(self, error: PeerError) -> None:
        """Note why the link is of no use any more, and let nobody wait for it."""
        if self.failure is None:
            error.peer_id = error.peer_id or self.hop.peer_id
            self.failure = error
            logger.debug("training.lost peer=%s why=%s", self.hop.peer_id, error)
        for pending in self._pending.values():
            pending.answered.set()
