"""A client's walk along a route: one stream to every hop, steps in at the first, results out of the last.

Steps go out without waiting for one another, so a prompt cut in chunks keeps all hops at work. Results come
back in the order of their steps.

A hop that fails is replaced while the others keep what they have (`chain.py` says how), and the steps whose
results are missing are sent again: the caller sees a pause and nothing else. Who takes over is for the
`replanner` to say. Without one, or when nobody can, the session ends with a `PeerError` that names the hop
that failed; whoever holds the session then plans another route and opens a new one.

A hop that is busy is not a hop that is dead. While a step takes long every hop is asked for a sign of life,
which its event loop gives whatever its device computes, and for one of its successor. Who gives none is
replaced. A hop that has become slow goes on working until somebody who would be much faster, if there is
anybody, has been fed what it knows.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Final

import msgspec
import torch
import trio
from torch import Tensor

from p2pinfer.errors import NoRoute, P2PInferError, PeerError, PeerVanished, ProtocolViolation
from p2pinfer.models.spec import ModelSpec
from p2pinfer.node.host import Host
from p2pinfer.node.tensors import decode_hidden, encode_hidden
from p2pinfer.node.wire import Bill, Codec, Refused, Result, Step
from p2pinfer.reputation.receipt import Payload
from p2pinfer.routing.route import Route

from .chain import Chain, ChainConfig, Recall, Spare
from .failover import Faults, Replanner
from .hop_stream import HopStream
from .opening import end_all, refusal_error
from .receipts import PassedStep, ReceiptBook
from .slowness import Slowness
from .upgrade import leave_relays

logger = logging.getLogger(__name__)

_SETTLED_TOKENS: Final = 32  # a spare that lacks no more than this is warm enough to take over
_MAX_ROUNDS: Final = 6  # of catching up with a session that goes on
_SLOWEST_BYTES_PER_S: Final = 1 << 20  # what a link carries at least; bytes under way excuse silence


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """How a client walks a route."""

    chunk_tokens: int = 256  # a longer prompt travels in chunks of at most this many tokens
    chunks_in_flight: int = 8  # chunks sent before the first one's result is awaited
    open_timeout_s: float = 15.0  # until every hop of a route has said yes
    step_timeout_s: float = 60.0  # for one result; a hop that takes longer counts as dead
    probe_after_s: float = 1.0  # after so long without a result, hops are asked for a sign of life
    probe_timeout_s: float = 1.5  # a hop that gives none in this time counts as dead
    repair_timeout_s: float = 5.0  # for one try to put others in place of a hop that failed
    max_repairs: int = 8  # tries in a row
    slow_step_s: float = 0.05  # a hop that takes so long for a token is replaced by one that would halve it

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


@dataclass(frozen=True, slots=True)
class _Sent:
    """A step that has no result yet."""

    step: Step
    payload: Payload


class Session:
    """An open session on every hop of `route`. Made by `open_session`; close it with `aclose`.

    Attributes:
        opened_route: The hops at the beginning.
        recall: What went in at past positions. With it the first hop can be replaced too. Called in a thread.
        failovers: How often hops failed and were replaced.
        handovers: How often a hop that still worked was replaced.
    """

    def __init__(
        self,
        host: Host,
        nursery: trio.Nursery,
        spec: ModelSpec,
        codec: Codec,
        config: SessionConfig,
        route: Route,
        max_tokens: int,
        *,
        replanner: Replanner | None = None,
        shunned: frozenset[str] = frozenset(),
        on_closed: Callable[[Session], None] = lambda _: None,
    ) -> None:
        self.session_id = secrets.token_bytes(16)
        chain_config = ChainConfig(
            session=self.session_id,
            spec=spec,
            codec=codec,
            max_tokens=max_tokens,
            chunk_tokens=config.chunk_tokens,
            chunks_in_flight=config.chunks_in_flight,
            open_timeout_s=config.open_timeout_s,
            probe_after_s=config.probe_after_s,
            probe_timeout_s=config.probe_timeout_s,
        )
        self.chain = Chain(host, nursery, chain_config, self)
        self._faults = Faults(
            self.chain,
            replanner,
            shunned,
            max_tokens=max_tokens,
            timeout_s=config.repair_timeout_s,
            probe_timeout_s=config.probe_timeout_s,
            max_repairs=config.max_repairs,
        )
        self.opened_route = route
        self.book: ReceiptBook | None = None
        self.broken_receipt: PeerError | None = None
        self.timings: list[StepTiming] = []
        self.failovers = 0
        self.handovers = 0
        self._nursery = nursery
        self._spec = spec
        self._codec: Codec = codec
        self._config = config
        self._max_tokens = max_tokens
        self._replanner = replanner
        self._next_number = 0
        self._length = 0  # positions whose results have come
        self._awaited: deque[_Sent] = deque()  # oldest first
        self._over: PeerError | None = None  # why nothing can be repaired
        self._turn = trio.Lock()  # held by a step, or by a change of hops between steps
        self._handing_over = trio.Lock()  # a spare is warmed for one place at a time
        self._warming: trio.CancelScope | None = None
        self._slowness = Slowness(config.slow_step_s)
        self._improving = trio.CancelScope()
        self._spare: Spare | None = None
        self._step_sent = trio.Event()
        self._progress_at = 0.0  # when something last came or went
        self._watchdog = trio.CancelScope()
        self._auditor = trio.CancelScope()
        self._upgrading = trio.CancelScope()
        self._receipts_due = trio.Event()
        self._on_closed = on_closed
        self._closed = False
        # As many results as are awaited, and a None for whatever else is to wake the one who waits.
        self._results_in, self._results = trio.open_memory_channel[tuple[Result, bytearray] | None](math.inf)

    @property
    def route(self) -> Route:
        """The hops that take part at the moment."""
        return self.chain.route

    @property
    def recall(self) -> Recall | None:
        return self.chain.recall

    @recall.setter
    def recall(self, recall: Recall | None) -> None:
        self.chain.recall = recall

    @property
    def failed_peers(self) -> frozenset[str]:
        """Everybody who failed this session, replaced or not."""
        return self._faults.shunned | {hop.peer_id for hop in self._faults.failed}

    async def decode(self, hidden: Tensor, position: int) -> Tensor:
        """Push the hidden states of `position`, `position + 1`, ... through every block.

        Args:
            hidden: (tokens, hidden_size). A `position` below the session's length rolls it back first.

        Returns:
            (tokens, hidden_size), in the session's codec.

        Raises:
            PeerError: A hop refused, vanished, broke protocol or took too long, and could not be replaced.
        """
        async with self._turn:
            started = time.perf_counter()
            await self._send(hidden, position, returns=len(hidden))
            result, output = await self._receive()
            self.timings.append(StepTiming(time.perf_counter() - started, result.bills))
            self._note_pace(result.bills)
            return output

    async def prefill(self, hidden: Tensor, position: int) -> Tensor:
        """Push a prompt through in chunks that follow each other without waiting.

        Returns:
            (1, hidden_size): the last token's hidden state.

        Raises:
            PeerError: As for `decode`.
        """
        async with self._turn:
            agreed = self.chain.agreed
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

    async def replace(self, peer_id: str, route: Route | None = None) -> None:
        """Put others in place of a hop that still works, between two steps; steps go on meanwhile.

        Args:
            route: Who is to take over; whom the replanner names, if None.

        Raises:
            NoRoute: There is nobody else. The session is as it was, here and in what follows.
            PeerError: Those who were to take over failed, or a hop of the session did meanwhile.
            ValueError: The peer is no hop of this session, or another one is being replaced.
        """
        hop = next((each for each in self.chain.hops if each.peer_id == peer_id), None)
        if hop is None or self._warming is not None or self._replanner is None:
            raise ValueError(f"{peer_id} cannot be replaced: no hop, or not the only one to be replaced")
        with trio.CancelScope() as self._warming:
            try:
                await self._hand_over(hop, route)
            finally:
                self._warming = None
                if self._spare is not None:
                    spare, self._spare = self._spare, None
                    await end_all(spare.hops)
        if hop in self.chain.hops:
            raise PeerVanished("a hop failed while another one was being replaced", peer_id)

    def per_hop_ms(self) -> tuple[float, ...]:
        """Each hop's median time per decode step, its queue included; empty before the first."""
        hops = zip(*(timing.bills for timing in self.timings), strict=False)
        return tuple(median(bill.serve_us for bill in bills) / 1e3 for bills in hops)

    def per_step_ms(self) -> float:
        """The median decode step as seen from here; 0 before the first."""
        return median(timing.seconds for timing in self.timings) * 1e3 if self.timings else 0.0

    async def aclose(self) -> None:
        """Tell every hop that the session is over; quick, and quiet about hops that are gone."""
        self._over = self._over or PeerVanished("the session is closed", self.chain.hops[-1].peer_id)
        self._watchdog.cancel()
        self._auditor.cancel()
        self._improving.cancel()
        self._upgrading.cancel()
        self._results_in.close()
        if not self._closed:
            self._closed = True
            self._on_closed(self)
        if self._warming is not None:
            self._warming.cancel()
        spares = self._spare.hops if self._spare else []
        await end_all([*self.chain.hops, *spares])

    # ------------------------------------------------------------------ steps and results

    async def _send(self, hidden: Tensor, position: int, returns: int) -> None:
        step = Step(self._next_number, self.chain.epoch, position, len(hidden), returns)
        self._next_number += 1
        if self._spare is not None:  # what is rolled back has to be replayed as well
            self._spare.filled = min(self._spare.filled, position)
        sent = _Sent(step, encode_hidden(hidden, self._codec))
        if not self._awaited:
            self._progress_at = trio.current_time()
        self._awaited.append(sent)
        self._step_sent.set()
        await self._push(sent)

    async def _push(self, sent: _Sent) -> None:
        """Send a step to the first hop. Should that be gone, it is sent again once there is another one."""
        first, limit_s = self.chain.hops[0], self._config.step_timeout_s
        try:
            with first.while_there(limit_s):
                await first.send(sent.step, sent.payload)
        except PeerVanished as exc:
            self.on_lost(first, exc)

    async def _receive(self) -> tuple[Result, Tensor]:
        """The oldest result that is missing, whatever has to be repaired for it."""
        limit_s = self._config.step_timeout_s
        answer: tuple[Result, bytearray] | None = None
        while answer is None:
            if self._over or self._faults.first:
                await self._repair()
            try:
                with trio.fail_after(limit_s):
                    answer = await self._results.receive()
            except trio.TooSlowError as exc:
                # Any hop may have kept it to itself: nobody is named.
                raise PeerVanished(f"no answer in {limit_s:g} s") from exc
            except trio.EndOfChannel as exc:
                raise self._over or PeerVanished("the session is closed") from exc
        result, payload = answer
        last = self.chain.hops[-1].peer_id
        return result, decode_hidden(payload, result.tokens, self._spec.hidden_size, self._codec, last)

    async def watch_receipts(self) -> None:
        """Check receipts as they gather, until the session is closed."""
        with self._auditor:
            while True:
                await self._receipts_due.wait()
                self._receipts_due = trio.Event()
                await self.settle()

    async def leave_relays(self) -> None:
        """Have the streams to hops move to direct connections that come up, until the session is closed."""
        with self._upgrading:
            await leave_relays(self.chain.host, self.session_id, lambda: [*self.chain.hops], self._quiet)

    @asynccontextmanager
    async def _quiet(self) -> AsyncGenerator[None]:
        """No step is under way meanwhile, and nobody is replaced."""
        async with self._handing_over, self._turn:
            yield

    async def settle(self) -> PeerError | None:
        """Check every receipt that has come; returns what is wrong with one, or None."""
        if self.book is not None and self.broken_receipt is None:
            try:
                await self.book.check()
            except PeerError as exc:
                self.broken_receipt = exc
                self._over = self._over or exc  # what followed may be wrong as well
                self._wake()
        return self.broken_receipt

    # ------------------------------------------------------------------ what hops say

    def on_result(self, stream: HopStream, result: Result, payload: bytearray) -> None:
        """Take a result that is due; drop one of an epoch that is over."""
        if stream is not self.chain.hops[-1]:
            if stream in self.chain.hops:
                raise ProtocolViolation("Result in the middle of the chain", stream.peer_id)
            return
        if result.epoch < self.chain.epoch:
            return
        if not self._awaited:
            raise ProtocolViolation(f"result {result.number}, which nobody asked for", stream.peer_id)
        step, sent = self._awaited[0].step, self._awaited[0].payload
        due = (step.number, step.epoch, step.returns)
        if (result.number, result.epoch, result.tokens) != due:
            raise ProtocolViolation(
                f"result {result.number} with {result.tokens} rows; due is {step.number} with {step.returns}",
                stream.peer_id,
            )
        self._awaited.popleft()
        self._length = step.position + step.tokens
        self._progress_at = trio.current_time()
        if self.book is not None:
            self.book.note(PassedStep(step, self.route.hops, sent, payload, result.receipts))
            if self.book.is_due:
                self._receipts_due.set()
        with suppress(trio.ClosedResourceError):  # it was on its way when we closed
            self._results_in.send_nowait((result, payload))

    def on_refused(self, stream: HopStream, refused: Refused) -> None:
        """Note what a hop cannot do any more."""
        if stream not in self.chain.hops:
            return
        error = refusal_error(refused, stream.peer_id, self.route)
        _, after = self.chain.neighbours([stream])
        if refused.code == "successor_vanished" and after is not None:
            self._faults.cut.setdefault(after, error)
        elif refused.code == "compute":
            self._faults.failed.setdefault(stream, error)
        else:  # the hop has ended the session; and what it complains of would come again
            self._faults.failed.setdefault(stream, error)
            self._over = self._over or error
        self._wake()

    def on_lost(self, stream: HopStream, error: PeerError) -> None:
        """Note that a hop is gone."""
        stream.give_up()
        if stream in self.chain.hops:
            self._faults.failed.setdefault(stream, error)
            self._wake()

    def on_leaving(self, stream: HopStream, seconds: float) -> None:
        """Have another one take over from a hop that is about to go."""
        logger.info("%s leaves in %.1f s", stream.peer_id, seconds)
        if stream in self.chain.hops and self._replanner is not None:
            self._nursery.start_soon(self._see_off, stream)

    async def _see_off(self, hop: HopStream) -> None:
        async with self._turn:  # not while it takes over
            self._improving.cancel()
        async with self._handing_over:
            for _ in range(self._config.max_repairs):
                if self._closed or not await self._try_to_see_off(hop):
                    break

    async def _try_to_see_off(self, hop: HopStream) -> bool:
        """False if that is all that can be done."""
        try:
            await self.replace(hop.peer_id)
        except PeerError as exc:  # of who was asked; others may have room
            logger.debug("session.handover_failed peer=%s why=%s", exc.peer_id, exc)
            return True
        except (P2PInferError, ValueError) as exc:
            logger.info("nobody takes over from %s before it leaves: %s", hop.peer_id, exc)
        return False

    def _note_pace(self, bills: tuple[Bill, ...]) -> None:
        self._slowness.note(bills)
        slow = self._slowness.suspect(trio.current_time())
        if slow is not None and self._replanner is not None and not self._handing_over.locked():
            place, seconds = slow
            self._nursery.start_soon(self._improve, self._replanner, self.chain.hops[place], seconds)

    async def _improve(self, replanner: Replanner, hop: HopStream, seconds: float) -> None:
        """Have somebody faster take over from a hop that takes so long for a step, if there is anybody."""
        with trio.CancelScope() as self._improving:
            async with self._handing_over:
                try:
                    route = await replanner.better(self._faults.gap([hop]), hop.hop, seconds)
                    if route is None:
                        return
                    logger.info(
                        "%s takes %.0f ms for a step; %s is to do better", hop.peer_id, seconds * 1e3, route
                    )
                    await self.replace(hop.peer_id, route)
                except (P2PInferError, ValueError) as exc:
                    logger.info("nobody better takes over from %s: %s", hop.peer_id, exc)

    def _wake(self) -> None:
        with suppress(trio.ClosedResourceError):
            self._results_in.send_nowait(None)

    async def keep_watch(self) -> None:
        """Ask for signs of life whenever a step takes long; until the session is closed."""
        with self._watchdog:
            while True:
                if not self._awaited:
                    self._step_sent = trio.Event()
                    await self._step_sent.wait()
                under_way = sum(len(sent.payload) for sent in self._awaited)
                due_at = self._progress_at + self._config.probe_after_s + under_way / _SLOWEST_BYTES_PER_S
                if trio.current_time() < due_at:
                    await trio.sleep_until(due_at)
                else:
                    await self._look_around()

    async def _look_around(self) -> None:
        asked_at, epoch = trio.current_time(), self.chain.epoch
        silent, cut = await self.chain.probe(self._config.probe_timeout_s)
        if self._progress_at < asked_at and self.chain.epoch == epoch:
            for hop in silent:
                self.on_lost(hop, PeerVanished("it shows no sign of life", hop.peer_id))
            for hop in cut:
                self._faults.cut.setdefault(
                    hop, PeerVanished("the hop before does not reach it", hop.peer_id)
                )
                self._wake()
        self._progress_at = trio.current_time()

    # ------------------------------------------------------------------ other hops

    async def _repair(self) -> None:
        """Mend what is broken, and send again what has no result.

        Raises:
            PeerError: It cannot be done; the session is over. If nobody can take over, NoRoute is its cause.
        """
        first = self._over or self._faults.first
        assert first is not None
        if self._over:
            raise first
        self._over = first  # unless what follows succeeds
        spare, self._spare = self._spare, None
        if self._warming is not None:
            self._warming.cancel()
        if spare is not None:
            spare.filled = 0  # how far it was fed is not known
        began_at = trio.current_time()
        steps = [each.step for each in self._awaited]
        if any(a.position + a.tokens != b.position for a, b in pairwise(steps)):
            raise first  # a step that rolls back has undone what the one before it needs
        try:
            await self._faults.mend(self._confirmed, spare)
        except NoRoute as exc:
            raise first from exc
        self._over = None
        self.failovers += 1
        self._forget_pace()
        await self._send_again()
        logger.info("the chain is whole again after %.2f s: %s", trio.current_time() - began_at, self.route)

    @property
    def _confirmed(self) -> int:
        """Positions that every hop has in its cache."""
        return self._awaited[0].step.position if self._awaited else self._length

    async def _send_again(self) -> None:
        """Send every step that has no result, under the epoch that has begun."""
        sent, self._awaited = self._awaited, deque[_Sent]()
        for each in sent:
            step = msgspec.structs.replace(each.step, epoch=self.chain.epoch)
            self._awaited.append(_Sent(step, each.payload))
        self._progress_at = trio.current_time()
        for each in [*self._awaited]:
            await self._push(each)

    async def _hand_over(self, hop: HopStream, route: Route | None) -> None:
        spare = self._spare = await self._faults.open_spare([hop], self._config.open_timeout_s, route)
        involved = [*spare.hops, *self.chain.neighbours([hop])[:1]]
        living = [each for each in involved if each is not None]
        for _ in range(_MAX_ROUNDS):
            if self._length - spare.filled <= _SETTLED_TOKENS:
                break
            await self.chain.attended(living, partial(self.chain.fill, spare, self._length))
        async with self._turn:
            if self._over or self._faults.first or hop not in self.chain.hops:
                return  # a failure came first
            await self._faults.take_over(spare, self._length)
            self._spare = None
            self.handovers += 1
            self._forget_pace()

    def _forget_pace(self) -> None:
        """Begin anew: what was measured is of hops that are not there any more."""
        self.timings.clear()
        self._slowness.forget()


async def open_session(
    host: Host,
    nursery: trio.Nursery,
    route: Route,
    spec: ModelSpec,
    *,
    max_tokens: int,
    codec: Codec,
    config: SessionConfig,
    replanner: Replanner | None = None,
    shunned: frozenset[str] = frozenset(),
    check_receipts: bool = True,
    keep_steps: bool = False,
    on_closed: Callable[[Session], None] = lambda _: None,
) -> Session:
    """Open a session on every hop of `route` at once.

    Args:
        nursery: Runs one small reader task per hop, and a few more, until the session is closed.
        max_tokens: How many positions every hop is to reserve.
        replanner: Whom to ask for others when a hop fails; None lets the session end with it.
        shunned: Peers that are not to be among those others.
        check_receipts: Demand a receipt from every hop for every step.
        keep_steps: Remember what went through, in `book.kept`, for an audit after the session.
        on_closed: Called once, when the session is closed.

    Raises:
        PeerError: A hop could not be reached or refused; nothing stays open.
    """
    session = Session(
        host,
        nursery,
        spec,
        codec,
        config,
        route,
        max_tokens,
        replanner=replanner,
        shunned=shunned,
        on_closed=on_closed,
    )
    await session.chain.open(route)
    nursery.start_soon(session.keep_watch)
    nursery.start_soon(session.leave_relays)
    if check_receipts:
        session.book = ReceiptBook(session.session_id, spec.revision, codec, host.verify, keep=keep_steps)
        nursery.start_soon(session.watch_receipts)
    return session
