"""A client's walk along a route: one stream to every hop, steps in at the first, results out of the last.

Steps go out without waiting for one another, so a prompt cut in chunks keeps all hops at work. Results come
back in the order of their steps.

A hop that fails is replaced while the others keep what they have (`chain.py` says how), and the steps whose
results are missing are sent again: the caller sees a pause and nothing else. Who takes over is for the
`replanner` to say. Without one, or when nobody can, the session ends with a `PeerError` that names the hop
that failed; whoever holds the session then plans another route and opens a new one.

So is a hop that shows no sign of life while a step waits (`watch.py`). One that leaves, or has become slow,
works on until others can take over (`handover.py`).
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from statistics import median

import torch
import trio
from torch import Tensor

from p2pinfer.client_config import SessionConfig as SessionConfig
from p2pinfer.errors import NoRoute, PeerError, PeerVanished, ProtocolViolation
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.node.host.host import Host
from p2pinfer.node.protocol.tensors import decode_hidden, encode_hidden
from p2pinfer.node.protocol.wire import Bill, Codec, Refused, Result
from p2pinfer.routing.route import Route

from .chain import Chain, ChainConfig, Recall
from .failover import Faults, Replanner
from .handover import Handovers
from .hop_stream import HopStream
from .opening import end_all, refusal_error
from .receipts import PassedStep, ReceiptBook
from .steps import Sent, Steps
from .upgrade import leave_relays
from .watch import keep_watch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepTiming:
    """How long one decode step took from the client's side, and what each hop says it spent."""

    seconds: float
    bills: tuple[Bill, ...]


class Session:
    """An open session on every hop of `route`. Made by `open_session`; close it with `aclose`.

    Attributes:
        opened_route: The hops at the beginning.
        recall: What went in at past positions. With it the first hop can be replaced too. Called in a thread.
        failovers: How often hops failed and were replaced.
        handovers: Replaces hops that still work.
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
        self._steps = Steps()
        self.handovers = Handovers(
            self.chain,
            self._faults,
            self._steps,
            replanner,
            nursery,
            open_timeout_s=config.open_timeout_s,
            max_tries=config.max_repairs,
            slow_step_s=config.slow_step_s,
            on_done=self.timings.clear,
        )
        self._spec = spec
        self._codec: Codec = codec
        self._config = config
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
        async with self._steps.turn:
            started = time.perf_counter()
            await self._push(self._begin(hidden, position, returns=len(hidden)))
            result, output = await self._receive()
            self.timings.append(StepTiming(time.perf_counter() - started, result.bills))
            self.handovers.note_pace(result.bills)
            return output

    async def prefill(self, hidden: Tensor, position: int) -> Tensor:
        """Push a prompt through in chunks that follow each other without waiting.

        Returns:
            (1, hidden_size): the last token's hidden state.

        Raises:
            PeerError: As for `decode`.
        """
        async with self._steps.turn:
            agreed = self.chain.agreed
            chunks = torch.split(hidden, agreed.chunk_tokens)
            for index, chunk in enumerate(chunks):
                if index >= agreed.chunks_in_flight:
                    await self._receive()
                is_last = index == len(chunks) - 1
                await self._push(self._begin(chunk, position, returns=1 if is_last else 0))
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

    async def aclose(self) -> None:
        """Tell every hop that the session is over; quick, and quiet about hops that are gone."""
        closed = PeerVanished("the session is closed", self.chain.hops[-1].peer_id)
        self._faults.fatal = self._faults.fatal or closed
        self._watchdog.cancel()
        self._auditor.cancel()
        self._upgrading.cancel()
        self._results_in.close()
        if not self._closed:
            self._closed = True
            self._on_closed(self)
        await end_all([*self.chain.hops, *self.handovers.close()])

    # ------------------------------------------------------------------ steps and results

    def _begin(self, hidden: Tensor, position: int, returns: int) -> Sent:
        spare = self.handovers.spare
        if spare is not None:  # what is rolled back has to be replayed as well
            spare.filled = min(spare.filled, position)
        payload = encode_hidden(hidden, self._codec)
        return self._steps.begin(self.chain.epoch, position, len(hidden), returns, payload)

    async def _push(self, sent: Sent) -> None:
        """Send a step to the first hop. Should that be gone, it is sent again once there is another one."""
        first, limit_s = self.chain.hops[0], self._config.step_timeout_s
        if first.send_now(sent.step, sent.payload):
            return
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
            if self._faults.fatal or self._faults.first:
                await self._repair()
            try:
                with trio.fail_after(limit_s):
                    answer = await self._results.receive()
            except trio.TooSlowError as exc:
                # Any hop may have kept it to itself: nobody is named.
                raise PeerVanished(f"no answer in {limit_s:g} s") from exc
            except trio.EndOfChannel as exc:
                raise self._faults.fatal or PeerVanished("the session is closed") from exc
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

    async def keep_watch(self) -> None:
        """Find out who shows no sign of life while a step waits, until the session is closed."""
        with self._watchdog:
            await keep_watch(
                self.chain,
                self._steps,
                after_s=self._config.probe_after_s,
                within_s=self._config.probe_timeout_s,
                on_silent=self.on_lost,
                on_cut=self._note_cut,
            )

    @asynccontextmanager
    async def _quiet(self) -> AsyncGenerator[None]:
        """No step is under way meanwhile, and nobody is replaced."""
        async with self.handovers.busy, self._steps.turn:
            yield

    async def settle(self) -> PeerError | None:
        """Check every receipt that has come; returns what is wrong with one, or None."""
        if self.book is not None and self.broken_receipt is None:
            try:
                await self.book.check()
            except PeerError as exc:
                self.broken_receipt = exc
                self._faults.fatal = self._faults.fatal or exc  # what followed may be wrong as well
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
        sent = self._steps.answer(result, stream.peer_id)
        if self.book is not None:
            self.book.note(PassedStep(sent.step, self.route.hops, sent.payload, payload, result.receipts))
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
            self._faults.fatal = self._faults.fatal or error
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
        if stream in self.chain.hops:
            self.handovers.see_off(stream)

    def _note_cut(self, stream: HopStream, error: PeerError) -> None:
        self._faults.cut.setdefault(stream, error)
        self._wake()

    def _wake(self) -> None:
        with suppress(trio.ClosedResourceError):
            self._results_in.send_nowait(None)

    # ------------------------------------------------------------------ other hops

    async def _repair(self) -> None:
        """Mend what is broken, and send again what has no result.

        Raises:
            PeerError: It cannot be done; the session is over. If nobody can take over, NoRoute is its cause.
        """
        faults = self._faults
        first = faults.fatal or faults.first
        assert first is not None
        if faults.fatal:
            raise first
        faults.fatal = first  # unless what follows succeeds
        if not self._steps.may_begin_anew:
            raise first
        spare = self.handovers.break_off()
        began_at = trio.current_time()
        try:
            await faults.mend(self._steps.confirmed, spare)
        except NoRoute as exc:
            raise first from exc
        faults.fatal = None
        self.failovers += 1
        self.timings.clear()
        self.handovers.forget_pace()
        for each in self._steps.begin_anew(self.chain.epoch):
            await self._push(each)
        logger.info("the chain is whole again after %.2f s: %s", trio.current_time() - began_at, self.route)


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
