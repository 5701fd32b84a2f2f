"""A client's walk along a route: one stream to every hop, steps in at the first, results out of the last.

Steps go out without waiting for one another, so a prompt cut in chunks keeps all hops at work. Results come
back in the order of their steps. A hop that refuses or vanishes ends the session with a `PeerError` that
names it; whoever holds the session then plans another route and opens a new one.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from statistics import median

import torch
import trio
from torch import Tensor

from p2pinfer.errors import (
    PeerError,
    PeerRefused,
    PeerUnreachable,
    PeerVanished,
    ProtocolViolation,
    WrongOutput,
)
from p2pinfer.models.spec import ModelSpec
from p2pinfer.node.host import Host
from p2pinfer.node.tensors import decode_hidden, encode_hidden, row_bytes
from p2pinfer.node.wire import (
    SESSION_PROTOCOL,
    Bill,
    Codec,
    FrameStream,
    Open,
    Opened,
    Refused,
    Result,
    Step,
    Successor,
)
from p2pinfer.reputation.receipt import Payload
from p2pinfer.routing.route import Hop, Route

from .agreed import Agreed, agree
from .receipts import PassedStep, ReceiptBook


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """How a client walks a route."""

    chunk_tokens: int = 256  # a longer prompt travels in chunks of at most this many tokens
    chunks_in_flight: int = 8  # chunks sent before the first one's result is awaited
    open_timeout_s: float = 15.0  # until every hop of a route has said yes
    step_timeout_s: float = 60.0  # for one result; a hop that takes longer counts as dead

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value <= 0:
                raise ValueError(f"{each.name} is {value:g}; it must be above 0")


@dataclass(frozen=True, slots=True)
class StepTiming:
    """How long one decode step took from the client's side, and what each hop says it spent."""

    seconds: float
    bills: tuple[Bill, ...]


class Session:
    """An open session on every hop of `route`. Made by `open_session`; close it with `aclose`."""

    def __init__(
        self,
        route: Route,
        spec: ModelSpec,
        codec: Codec,
        config: SessionConfig,
        streams: Sequence[FrameStream],
        agreed: Agreed,
        book: ReceiptBook | None = None,
        on_closed: Callable[[Session], None] = lambda _: None,
    ) -> None:
        self.route = route
        self._agreed = agreed
        self.opened_route = route
        self.book = book
        self.broken_receipt: PeerError | None = None
        self.timings: list[StepTiming] = []
        self._spec = spec
        self._codec: Codec = codec
        self._config = config
        self._streams = streams
        self._next_number = 0
        self._epoch = 0
        self._failure: PeerError | None = None
        self._on_closed = on_closed
        self._awaited: deque[tuple[Step, Payload]] = deque()  # sent and not answered yet, oldest first
        self._receipts_due = trio.Event()
        # As many as are awaited: `_deliver` lets in no others.
        self._results_in, self._results = trio.open_memory_channel[tuple[Result, bytearray]](math.inf)
        self._watchers = [trio.CancelScope() for _ in (*streams, "receipts")]
        self._closed = False

    async def decode(self, hidden: Tensor, position: int) -> Tensor:
        """Push the hidden states of `position`, `position + 1`, ... through every block.

        Args:
            hidden: (tokens, hidden_size). A `position` below the session's length rolls it back first.

        Returns:
            (tokens, hidden_size), in the session's codec.

        Raises:
            PeerError: A hop refused, vanished, broke protocol or took too long; the session is over.
        """
        started = time.perf_counter()
        await self._send(hidden, position, returns=len(hidden))
        result, output = await self._receive()
        self.timings.append(StepTiming(time.perf_counter() - started, result.bills))
        return output

    async def prefill(self, hidden: Tensor, position: int) -> Tensor:
        """Push a prompt through in chunks that follow each other without waiting.

        Returns:
            (1, hidden_size): the last token's hidden state.

        Raises:
            PeerError: As for `decode`.
        """
        agreed = self._agreed
        chunks = torch.split(hidden, agreed.chunk_tokens)
        for index, chunk in enumerate(chunks):
            if index >= agreed.chunks_in_flight:
                await self._receive()
            is_last = index == len(chunks) - 1
            await self._send(chunk, position, returns=1 if is_last else 0)
            position += len(chunk)
        for _ in range(min(len(chunks), agreed.chunks_in_flight) - 1):
            await self._receive()
        _, last = await self._receive()
        return last

    def per_hop_ms(self) -> tuple[float, ...]:
        """Each hop's median time per decode step, its queue included; empty before the first."""
        hops = zip(*(timing.bills for timing in self.timings), strict=False)
        return tuple(median(bill.serve_us for bill in bills) / 1e3 for bills in hops)

    def per_step_ms(self) -> float:
        """The median decode step as seen from here; 0 before the first."""
        return median(timing.seconds for timing in self.timings) * 1e3 if self.timings else 0.0

    async def _send(self, hidden: Tensor, position: int, returns: int) -> None:
        step = Step(self._next_number, self._epoch, position, len(hidden), returns)
        self._next_number += 1
        payload = encode_hidden(hidden, self._codec)
        self._awaited.append((step, payload))
        first, limit_s = self._streams[0], self._config.step_timeout_s
        try:
            with trio.fail_after(limit_s):
                await first.send(step, payload)
        except PeerVanished as exc:
            raise self._failure or exc from exc
        except trio.TooSlowError as exc:
            raise PeerVanished(f"it took nothing in for {limit_s:g} s", first.peer_id) from exc

    async def _receive(self) -> tuple[Result, Tensor]:
        last = self._streams[-1].peer_id
        try:
            with trio.fail_after(self._config.step_timeout_s):
                result, payload = await self._results.receive()
        except trio.TooSlowError as exc:
            # Any hop may have kept it to itself: nobody is named.
            raise PeerVanished(f"no answer in {self._config.step_timeout_s:g} s") from exc
        except trio.EndOfChannel as exc:
            raise self._failure or PeerVanished("the session is closed", last) from exc
        hidden = decode_hidden(payload, result.tokens, self._spec.hidden_size, self._codec, last)
        return result, hidden

    async def watch(self, index: int) -> None:
        """Read hop `index`'s stream to its end: results from the last hop, refusals from any."""
        stream = self._streams[index]
        try:
            with self._watchers[index]:
                while True:
                    message, payload = await stream.receive()
                    match message:
                        case Result() if index == len(self._streams) - 1:
                            self._deliver(message, payload)
                        case Refused():
                            raise refusal_error(message, stream.peer_id, self.route)
                        case _:
                            raise ProtocolViolation(
                                f"{type(message).__name__} in the middle of a session", stream.peer_id
                            )
        except PeerError as exc:
            self._fail(exc)

    async def watch_receipts(self) -> None:
        """Check receipts as they gather, until the session is closed."""
        assert self.book is not None
        with self._watchers[-1]:
            while True:
                await self._receipts_due.wait()
                self._receipts_due = trio.Event()
                await self.settle()

    async def settle(self) -> PeerError | None:
        """Check every receipt that has come; returns what is wrong with one, or None."""
        if self.book is not None and self.broken_receipt is None:
            try:
                await self.book.check()
            except PeerError as exc:
                self.broken_receipt = exc
                self._fail(exc)
        return self.broken_receipt

    def _fail(self, error: PeerError) -> None:
        self._failure = self._failure or error
        self._results_in.close()

    def _deliver(self, result: Result, payload: bytearray) -> None:
        last = self._streams[-1].peer_id
        if not self._awaited:
            raise ProtocolViolation(f"result {result.number}, which nobody asked for", last)
        step, sent = self._awaited.popleft()
        due = (step.number, step.epoch, step.returns)
        if (result.number, result.epoch, result.tokens) != due:
            raise ProtocolViolation(
                f"result {result.number} with {result.tokens} rows; due is {step.number} with {step.returns}",
                last,
            )
        if self.book is not None:
            self.book.note(PassedStep(step, self.route.hops, sent, payload, result.receipts))
            if self.book.is_due:
                self._receipts_due.set()
        with suppress(trio.ClosedResourceError):  # it was on its way when we closed
            self._results_in.send_nowait((result, payload))

    async def aclose(self) -> None:
        """Tell every hop that the session is over; quick, and quiet about hops that are gone."""
        for scope in self._watchers:
            scope.cancel()
        self._results_in.close()
        if not self._closed:
            self._closed = True
            self._on_closed(self)
        await _close_all(self._streams)


async def open_session(
    host: Host,
    nursery: trio.Nursery,
    route: Route,
    spec: ModelSpec,
    *,
    max_tokens: int,
    codec: Codec,
    config: SessionConfig,
    check_receipts: bool = True,
    keep_steps: bool = False,
    on_closed: Callable[[Session], None] = lambda _: None,
) -> Session:
    """Open a session on every hop of `route` at once.

    Args:
        nursery: Runs one small reader task per hop until the session is closed.
        max_tokens: How many positions every hop is to reserve.
        check_receipts: Demand a receipt from every hop for every step.
        keep_steps: Remember what went through, in `book.kept`, for an audit after the session.
        on_closed: Called once, when the session is closed.

    Raises:
        PeerError: A hop could not be reached or refused; nothing stays open.
    """
    openings = _openings(host.peer_id, route, spec, max_tokens, codec)
    streams: dict[int, FrameStream] = {}
    ready: dict[int, Opened] = {}
    failures: list[PeerError] = []

    async def open_hop(index: int, hop: Hop, scope: trio.CancelScope) -> None:
        try:
            stream = await host.open_stream(hop.peer_id, SESSION_PROTOCOL, hop.addrs)
            largest = config.chunk_tokens * row_bytes(spec.hidden_size, codec)
            frames = FrameStream(stream, max_payload_bytes=largest, peer_id=hop.peer_id)
            streams[index] = frames
            await frames.send(openings[index])
            match (await frames.receive())[0]:
                case Opened() as opened:
                    ready[index] = opened
                case Refused() as refused:
                    raise refusal_error(refused, hop.peer_id, route)
                case other:
                    raise ProtocolViolation(f"answered {type(other).__name__} to an opening", hop.peer_id)
        except PeerError as exc:
            failures.append(exc)
            scope.cancel()

    try:
        with trio.move_on_after(config.open_timeout_s):
            async with trio.open_nursery() as opening:
                for index, hop in enumerate(route.hops):
                    opening.start_soon(open_hop, index, hop, opening.cancel_scope)
        if not failures and len(ready) < len(route.hops):
            silent = next(hop for index, hop in enumerate(route.hops) if index not in ready)
            failures.append(
                PeerUnreachable(f"did not open a session within {config.open_timeout_s:g} s", silent.peer_id)
            )
        if failures:
            raise failures[0]
    except BaseException:
        await _close_all(list(streams.values()))
        raise
    book = None
    if check_receipts:
        session_id = openings[0].session
        book = ReceiptBook(session_id, spec.revision, codec, host.verify, keep=keep_steps)
    agreed = agree(
        config.chunk_tokens, config.chunks_in_flight, row_bytes(spec.hidden_size, codec), ready.values()
    )
    in_order = [streams[index] for index in range(len(route.hops))]
    session = Session(route, spec, codec, config, in_order, agreed, book, on_closed)
    for index in range(len(route.hops)):
        nursery.start_soon(session.watch, index)
    if book is not None:
        nursery.start_soon(session.watch_receipts)
    return session


def _openings(client_id: str, route: Route, spec: ModelSpec, max_tokens: int, codec: Codec) -> list[Open]:
    """What to ask of each hop: all the same session, each with its neighbours."""
    session_id = secrets.token_bytes(16)
    hops = route.hops
    openings: list[Open] = []
    for index, hop in enumerate(hops):
        after = hops[index + 1] if index + 1 < len(hops) else None
        openings.append(
            Open(
                session_id,
                spec.revision,
                hop.span.start,
                hop.span.stop,
                max_tokens,
                codec,
                predecessor=hops[index - 1].peer_id if index else None,
                successor=Successor(after.peer_id, tuple(after.addrs)) if after else None,
            )
        )
    return openings


def refusal_error(refused: Refused, sender: str, route: Route) -> PeerError:
    """The error that a refusal amounts to, and whose it is.

    A hop's word about its neighbour is hearsay, but the two share an edge that does not work, so leaving
    the neighbour out of the next route is right whoever is at fault. Its word about anybody else is not
    taken: then it is the sender that is left out.
    """
    peers = route.peer_ids
    at = peers.index(sender)
    neighbours = {*peers[max(at - 1, 0) : at], *peers[at + 1 : at + 2]}
    blamed = refused.peer_id if refused.peer_id in neighbours else sender
    match refused.code:
        case "successor_unreachable":
            return PeerUnreachable(refused.message, blamed)
        case "successor_vanished":
            return PeerVanished(refused.message, blamed)
        case "wrong_input":
            return WrongOutput(refused.message, blamed)
        case "protocol":
            return PeerRefused(refused.message, blamed, refused.code)
        case _:
            return PeerRefused(refused.message, sender, refused.code)


async def _close_all(streams: Sequence[FrameStream]) -> None:
    """End every stream, shielded and within a second: a hop frees its cache when it hears of it."""
    with trio.CancelScope(shield=True), trio.move_on_after(1):
        async with trio.open_nursery() as closing:
            for stream in streams:
                closing.start_soon(stream.end)
