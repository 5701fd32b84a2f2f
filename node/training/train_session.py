"""One client's training on this node: its adapters, its requests in flight, their answers."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Final

import torch
import trio

from p2pinfer.errors import ProtocolViolation, WrongOutput
from p2pinfer.models.learning.adapter import Adapter
from p2pinfer.models.learning.brought import AdapterShelf, BroughtAdapter
from p2pinfer.models.numerics import row_bytes
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.protocol.messages import printable
from p2pinfer.node.protocol.train_messages import (
    Adapt,
    Adapted,
    Backward,
    Backwarded,
    DeclineCode,
    Declined,
    Done,
    Forget,
    Forward,
    Forwarded,
    TrainMessage,
)
from p2pinfer.node.protocol.train_receipt import TrainSigner
from p2pinfer.node.protocol.train_stream import TrainStream
from p2pinfer.node.protocol.train_tensors import (
    decode_vector,
    digest_of_adapter,
    input_bytes,
    layout_of,
)

from .kept_inputs import KeptInputs
from .train_work import BackwardWork, ForwardWork, Passing, PassWork

logger = logging.getLogger(__name__)

KEPT_ADAPTERS: Final = 2  # this step's, and the former one's for microbatches that are still under way


class Decline(Exception):
    """Reason why a request, or a session, is declined."""

    def __init__(self, code: DeclineCode, message: str) -> None:
        super().__init__(message)
        self.code: DeclineCode = code


def largest_payload(hidden_size: int, config: ServeConfig) -> int:
    """Bytes of the largest payload that a client may send: a backward pass with its inputs, or an adapter."""
    backward = input_bytes(config.train_tokens, hidden_size, "float32") + config.train_tokens * row_bytes(
        hidden_size, "float32"
    )
    return max(backward, config.client_adapter_bytes)


class TrainSession:
    """Answers the requests of one session, until its client leaves or it is idle too long."""

    def __init__(
        self,
        passing: Passing,
        frames: TrainStream,
        signer: TrainSigner,
        kept: KeptInputs,
        shelf: AdapterShelf,
        config: ServeConfig,
    ) -> None:
        self.client_id = frames.peer_id
        self.tokens = 0  # that passes were computed for
        self.leaving = False
        self._passing = passing
        self._frames = frames
        self._signer = signer
        self._kept = kept
        self._shelf = shelf
        self._brought: OrderedDict[bytes, BroughtAdapter] = OrderedDict()  # for sessions of this client
        self._config = config
        self._adapters: OrderedDict[bytes, Adapter] = OrderedDict()
        self._in_flight: set[PassWork] = set()
        self._ended, self._answers = trio.open_memory_channel[PassWork](config.train_in_flight)

    async def run(self) -> None:
        """Serve until the client says `Done`.

        Raises:
            PeerError: The client broke the protocol or vanished.
            Decline: It was idle too long.
        """
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(self._answer_passes)
                await self._read_requests()
        finally:
            for work in self._in_flight:
                work.is_wanted = False
                self._kept.bytes_in_flight -= work.size
            self._kept.drop_all(self)
            self._passing.close()

    async def _read_requests(self) -> None:
        while True:
            with trio.move_on_after(self._config.lease_s) as lease:
                message, payload = await self._frames.receive()
            if lease.cancelled_caught:
                raise Decline("idle", f"no request for {self._config.lease_s:.0f} s")
            if isinstance(message, Done):
                return
            try:
                await self._take(message, payload)
                if self._frames.meter is not None:
                    self._frames.meter.steps += 1
                    self._frames.meter.step_bytes += len(payload)
            except Decline as exc:
                assert isinstance(message, Adapt | Forward | Backward)
                await self._frames.send(Declined(exc.code, printable(str(exc)), message.number))

    async def _take(self, message: TrainMessage, payload: bytearray) -> None:
        match message:
            case Adapt():
                await self._adapt(message, payload)
            case Forward():
                self._begin_forward(message, payload)
            case Backward():
                self._begin_backward(message, payload)
            case Forget():
                self._kept.drop(self, message.forward)
            case _:
                raise ProtocolViolation(f"{type(message).__name__} from a client", self.client_id)

    # ------------------------------------------------------------------ adapters

    async def _adapt(self, message: Adapt, payload: bytearray) -> None:
        config = self._config
        if len(payload) > config.client_adapter_bytes:
            raise Decline(
                "too_large",
                f"an adapter of {len(payload)} bytes; this node takes {config.client_adapter_bytes}",
            )
        rank = max((each.rank for each in message.updates), default=0)
        if rank > config.max_adapter_rank:
            raise Decline("too_large", f"an update of rank {rank}; this node takes {config.max_adapter_rank}")
        adapter = await trio.to_thread.run_sync(self._checked, message, payload)
        self._adapters[message.digest] = adapter
        self._adapters.move_to_end(message.digest)
        passes = self._passing.passes
        if adapter.layout.is_low_rank:  # sessions apply nothing else
            brought = BroughtAdapter(
                adapter, passes.blocks.architecture, self._passing.span, passes.device_of
            )
            self._brought[message.digest] = self._shelf.put(self.client_id, message.digest, brought)
        for kept in (self._adapters, self._brought):
            while len(kept) > KEPT_ADAPTERS:
                kept.popitem(last=False)
        await self._frames.send(Adapted(message.number))

    def _checked(self, message: Adapt, payload: bytearray) -> Adapter:
        """The adapter in a message; in a thread, since hashing takes its time."""
        blocks, span = self._passing.passes.blocks, self._passing.span
        layout = layout_of(message.updates, message.prompt_tokens)
        try:
            values = decode_vector(payload, layout.size(blocks.architecture, span), self.client_id)
        except (ValueError, ProtocolViolation, WrongOutput) as exc:
            raise Decline("wrong_adapter", str(exc)) from exc
        if digest_of_adapter(message.updates, message.prompt_tokens, payload) != message.digest:
            raise Decline("wrong_adapter", "an adapter that is not what its digest says")
        with torch.no_grad():
            return Adapter(layout, values.to(blocks.device), blocks.architecture, span)

    def _adapter(self, digest: bytes | None) -> Adapter | None:
        if digest is None:
            return None
        adapter = self._adapters.get(digest)
        if adapter is None:
            raise Decline("adapter_gone", "this adapter is not held here; send it again")
        return adapter

    # ------------------------------------------------------------------ passes

    def _begin_forward(self, message: Forward, payload: bytearray) -> None:
        self._check_room(message, len(payload))
        adapter = self._adapter(message.adapter)
        work = ForwardWork(
            self._passing,
            message,
            payload,
            adapter,
            lambda: self._note_end(work),
            self._kept.graph_bytes,
        )
        self._begin(work)

    def _begin_backward(self, message: Backward, payload: bytearray) -> None:
        self._check_room(message, len(payload))
        kept = None if message.sends_inputs else self._kept.get(self, message.forward)
        if kept is None and not message.sends_inputs:
            raise Decline("inputs_gone", "the inputs of this pass are not kept any more; send them again")
        adapter = self._adapter(message.adapter)
        work = BackwardWork(self._passing, message, payload, kept, adapter, lambda: self._note_end(work))
        self._begin(work)

    def _check_room(self, message: Forward | Backward, size: int) -> None:
        tokens = sum(message.lengths)
        served = self._passing.span
        if not served.start <= message.start < message.stop <= served.stop:
            raise Decline("wrong_span", f"this session is about blocks {served}")
        if self.leaving:
            raise Decline("leaving", "this node is shutting down")
        if tokens > self._config.train_tokens:
            raise Decline(
                "too_large", f"a microbatch of {tokens} tokens; this node takes {self._config.train_tokens}"
            )
        if len(self._in_flight) >= self._config.train_in_flight:
            raise ProtocolViolation("more requests in flight than this node takes", self.client_id)
        in_flight = self._kept.bytes_in_flight
        if in_flight and in_flight + size > self._kept.max_bytes:
            raise Decline("busy", f"{in_flight} bytes of microbatches wait here; ask again in a moment")

    def _begin(self, work: PassWork) -> None:
        self._in_flight.add(work)
        self._kept.bytes_in_flight += work.size
        self._passing.begin(work)

    def _note_end(self, work: PassWork) -> None:
        if work.is_wanted:
            self._ended.send_nowait(work)  # never full: requests in flight are bounded

    async def _answer_passes(self) -> None:
        async for work in self._answers:
            assert isinstance(work, ForwardWork | BackwardWork)
            self._in_flight.discard(work)
            self._kept.bytes_in_flight -= work.size
            await self._answer(work)

    async def _answer(self, work: ForwardWork | BackwardWork) -> None:
        number = work.request.number
        if work.error is None:
            await trio.to_thread.run_sync(work.seal)
        if work.digests is None:
            await self._frames.send(_declined(work))
            return
        tokens = sum(work.lengths)
        self.tokens += tokens
        if isinstance(work, ForwardWork):
            if work.inputs is not None:
                self._kept.add(self, number, self.client_id, work.inputs)
            receipt = self._signer.attest("forward", tokens, work.digests)
            await self._frames.send(Forwarded(number, receipt), *work.payload)
        else:
            self._kept.drop(self, work.request.forward)
            receipt = self._signer.attest("backward", tokens, work.digests)
            await self._frames.send(Backwarded(number, receipt), *work.payload)


def _declined(work: ForwardWork | BackwardWork) -> Declined:
    """The answer to a pass that could not be done."""
    error, number = work.error, work.request.number
    if isinstance(error, WrongOutput | ProtocolViolation):
        return Declined("wrong_input", printable(str(error)), number)
    return Declined("compute", printable(f"the pass failed: {error}"), number)
