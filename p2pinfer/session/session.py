"""Session on the hops of a route: steps go in at the first, results come out of the last.

Steps go out without waiting for one another, so a prompt cut in chunks keeps all hops at work. Results come
back in the order of their steps; `submit` sends, and whoever wants the result waits for what it returns.

A hop that fails is replaced while the others keep what they have (`chain.py` says how), and the steps whose
results are missing are sent again: the caller sees a pause and nothing else. Who takes over is for the
`replanner` to say. Without one, or when nobody can, the session ends with a `PeerError` that names the hop
that failed; whoever holds the session then plans another route and opens a new one.

So is a hop that shows no sign of life while a step waits (`liveness.py`). One that leaves, or is slow, works
on until others can take over (`handover.py`). A session's tasks have a nursery of their own: an error that is
no peer's ends that session and no other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from statistics import median
from typing import Any

import trio

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import PeerError, PeerVanished, ProtocolViolation
from p2pinfer.events import Report
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.messages import Refused, Result
from p2pinfer.node.protocol.relay_upgrade import is_worth_moving
from p2pinfer.routing.route import Route

from .chain import Chain, ReplaySource
from .failover import Failover, IsUnwanted, Replanner
from .faults import Faults
from .handover import LOOK_EVERY, Handovers
from .hop_stream import HopStream
from .in_flight import Answer, InFlight, Promise, SentStep
from .liveness import keep_watch
from .opening import end_all, refusal_error
from .pending import Meanwhile, Pending, StepTiming, Superseded
from .prefill import send_in_chunks
from .receipt_checks import PassedStep, ReceiptBook
from .relay_upgrade import leave_relays
from .repair import Repair
from .reporter import Reporter
from .terms import Inputs, SessionTerms

logger = logging.getLogger(__name__)


class Session:
    """An open session on every hop of a route. `open_session` and `start_session` make one.

    Attributes:
        timings: Decode steps since the last change of hops.
        handovers: Replaces hops that still work.
        repair: Replaces hops that do not.
        broken_receipt: What was wrong with a receipt, if anything was.
    """

    def __init__(
        self,
        host: Network,
        nursery: trio.Nursery,
        terms: SessionTerms,
        config: SessionConfig,
        *,
        replay_source: ReplaySource | None,
        replanner: Replanner | None,
        excluded: frozenset[str],
        is_unwanted: IsUnwanted,
        book: ReceiptBook | None,
        report: Report | None,
    ) -> None:
        self.book = book
        self.broken_receipt: PeerError | None = None
        self.timings: list[StepTiming] = []
        self.chain = Chain(host, nursery, terms, config, self, replay_source)
        self._terms = terms
        self._format = terms.format()
        self._config = config
        self._steps = InFlight()
        self.reporter = Reporter(terms.session, report)
        self._faults = Faults(excluded, self.reporter)
        self._failover = Failover(self.chain, self._faults, replanner, config, is_unwanted)
        self.handovers = Handovers(
            self.chain,
            self._failover,
            self._faults,
            self._steps,
            replanner,
            nursery,
            config,
            on_done=self._note_handover,
        )
        self.repair = Repair(
            self.chain, self._faults, self._failover, self.handovers, self._steps, self.reporter, self._push
        )
        self._prompt_at: float | None = trio.current_time()  # of what is under way; a session begins with one
        self._receipts_due = trio.Event()
        self._closing = trio.Event()
        self._keep = False
        self._closed = trio.Event()

    @property
    def session_id(self) -> bytes:
        """The session's random 16-byte name."""
        return self._terms.session

    @property
    def route(self) -> Route:
        """The hops that take part at the moment."""
        return self.chain.route

    @property
    def failovers(self) -> int:
        """Number of times that hops failed and were replaced."""
        return self.repair.done

    @property
    def failed_peers(self) -> frozenset[str]:
        """Peers that failed this session, replaced or not."""
        return self._faults.excluded | {hop.peer_id for hop in self._faults.failed}

    # ------------------------------------------------------------------ steps

    async def submit(
        self, inputs: Inputs, position: int, *, returns: int | None = None, kept: bool = False
    ) -> Pending:
        """Send inputs through every block, without waiting for what becomes of them.

        Args:
            inputs: (tokens, hidden_size), or ids. A `position` below what was sent last rolls back first.
            returns: Of how many tokens, the last ones, there are to be outputs; of all if None.
            kept: Name them only: they are of the `chain.prefix`, and none come back.

        Raises:
            PeerError: The session is over.
        """
        promise = await self._submit(inputs, position, len(inputs) if returns is None else returns, kept=kept)
        return Pending(partial(self._output_of, promise))

    async def decode(self, inputs: Inputs, position: int, meanwhile: Meanwhile | None = None) -> Any:
        """Push the inputs of `position`, `position + 1`, ... through every block.

        Args:
            inputs: (tokens, hidden_size), or ids. A `position` below the session's length rolls it back.
            meanwhile: Called once they are on their way, before their outputs are waited for.

        Returns:
            Hidden states (tokens, hidden_size) in the session's codec; `Draws` if it draws.

        Raises:
            PeerError: A hop refused, vanished, broke protocol or took too long, and could not be replaced.
        """
        started = time.perf_counter()
        self._prompt_at = None
        promise = await self._submit(inputs, position, len(inputs))
        if meanwhile is not None:
            await meanwhile()
        answer = await self._answered(promise)
        timing = StepTiming(time.perf_counter() - started, answer.result.bills, len(inputs))
        self.timings.append(timing)
        self.handovers.unseen.append((timing.bills, timing.tokens))
        if len(self.handovers.unseen) >= LOOK_EVERY:
            self.handovers.look_for_stragglers()
        if self.reporter.is_followed:
            self.reporter.step_done(position, len(inputs), timing.seconds, timing.bills)
        return self._decoded(answer)

    async def prefill(self, inputs: Inputs, position: int, *, kept: int = 0) -> Any:
        """Push a prompt through in chunks that follow each other without waiting.

        Args:
            inputs: (tokens, hidden_size), or ids.
            kept: How many of them, from `position` 0 on, are of the `chain.prefix` and do not travel.

        Returns:
            As `decode`, for the last token alone.

        Raises:
            PeerError: As for `decode`.
        """
        self._prompt_at = trio.current_time()
        try:
            return await send_in_chunks(inputs, position, self.submit, self.chain, kept)
        finally:
            self._prompt_at = None

    async def roll_back(self, position: int) -> None:
        """Forget whatever was sent from `position` on.

        Steps in flight that begin there or later are superseded: hops drop them unread where they can, their
        results are not taken, and whoever waits for one gets `Superseded`.
        """
        async with self._steps.lock:
            self.chain.begin_epoch()
            self.handovers.note_rolled_back(position)
            self._steps.drop_from(position, Superseded(f"rolled back to position {position}"))

    def per_hop_ms(self) -> tuple[float, ...]:
        """Each hop's median time per position of a decode step, with its queue; empty before the first."""
        spent = ([bill.serve_us / timing.tokens for bill in timing.bills] for timing in self.timings)
        return tuple(median(hop) / 1e3 for hop in zip(*spent, strict=False))

    def per_step_ms(self) -> float:
        """Median time per position of a decode step, as seen from here; 0 before the first."""
        return median([timing.seconds / timing.tokens for timing in self.timings] or [0.0]) * 1e3

    async def settle(self) -> PeerError | None:
        """Check every receipt that has come; returns what is wrong with one, or None."""
        if self.book is not None and self.broken_receipt is None:
            try:
                await self.book.check()
            except PeerError as exc:
                self.broken_receipt = exc
                self._faults.give_up(exc)  # what followed may be wrong as well
        return self.broken_receipt

    async def _answered(self, promise: Promise) -> Answer:
        """Result of a step, whatever has to be repaired for it."""
        limit_s = self._config.step_timeout_s
        while True:
            before = self._progress
            with trio.move_on_after(limit_s) as patience:
                return await promise.wait()
            # With a fault noted a repair is under way, which has limits of its own. Raising here would end a
            # session that is about to be mended. Nor is it time while a long prompt goes out.
            if patience.cancelled_caught and self._faults.first is None and self._progress == before:
                # Any hop may have kept it to itself: nobody is named.
                raise PeerVanished(f"no answer in {limit_s:g} s")

    @property
    def _progress(self) -> tuple[object, ...]:
        """Changes whenever something has come back or gone out."""
        first = self.chain.hops[0]
        return self._steps.progress_at, first, first.sent_bytes

    async def _output_of(self, promise: Promise) -> Any:
        return self._decoded(await self._answered(promise))

    def _decoded(self, answer: Answer) -> Any:
        """Output of an answer, for the positions that were to come back."""
        return self._format.decode(answer.payload, answer.result.tokens, peer_id=answer.peer_id)

    async def _submit(self, inputs: Inputs, position: int, returns: int, *, kept: bool = False) -> Promise:
        # One holder of the lock from the number to the frame: steps leave in the order of their numbers, on
        # which hops and `InFlight.answer` rely. While a repair holds it, nothing goes out. Where the frame
        # needs no waiting there is no suspension between the two, so a look at the lock will do.
        sent = None if self._steps.lock.is_held else self._begin(inputs, position, returns, kept)
        if sent is None or not self.chain.hops[0].send_now(sent.step, sent.payload):
            async with self._steps.lock:  # which suspends only if it was held
                sent = sent or self._begin(inputs, position, returns, kept)
                await self._push(sent)
        return sent.promise

    def _begin(self, inputs: Inputs, position: int, returns: int, kept: bool) -> SentStep:
        """Give a step its number. It must be sent before any other one begins."""
        if self._faults.fatal is not None:
            raise self._faults.fatal
        if self.handovers.replacement is not None:
            self.handovers.note_rolled_back(position)
        payload = self._format.encode_at(inputs, is_packed=position < self._terms.packed)
        return self._steps.begin(self.chain.epoch, position, len(inputs), returns, payload, kept=kept)

    async def _push(self, sent: SentStep) -> None:
        """Send a step to the first hop. Should that be gone, it is sent again once there is another one."""
        first, limit_s = self.chain.hops[0], self._config.step_timeout_s
        if first.send_now(sent.step, sent.payload):
            return
        try:
            with first.until_given_up(limit_s + 2 * first.line.seconds_for(len(sent.payload))):
                await first.send(sent.step, sent.payload)
        except PeerVanished as exc:
            # Noted, not raised: the step is registered, so the repair sends it, and its promise is kept.
            self.on_lost(first, exc)

    # ------------------------------------------------------------------ what hops say

    def on_result(self, stream: HopStream, result: Result, payload: bytearray) -> None:
        """Take a result that is due; drop one that a roll-back or a repair has superseded."""
        # A hop that was replaced may still have results on their way: they are dropped, and it is not blamed.
        if stream is not self.chain.hops[-1]:
            if stream in self.chain.hops:
                raise ProtocolViolation("Result in the middle of the chain", stream.peer_id)
            return
        is_late = result.epoch < self.chain.epoch and not self._steps.is_awaited(result)
        # Else its step is sent again: a hop that has taken over is fed up to it, and would miss it.
        if is_late or not self._steps.takes_results:
            return
        sent = self._steps.answer(result, payload, stream.peer_id)
        if self.book is not None:
            passed = PassedStep(
                sent.step, self.chain.route.hops, sent.payload, payload, result.receipts, result.drawn
            )
            if self.book.add(passed, result.bills):
                self._receipts_due.set()

    def on_refused(self, stream: HopStream, refused: Refused) -> None:
        """Note what a hop cannot do any more."""
        if stream not in self.chain.hops:
            return
        error = refusal_error(refused, stream.peer_id, self.route)
        _, after = self.chain.neighbours([stream])
        # A hop's word on its neighbour is hearsay: the edge counts as cut, and the repair asks the neighbour.
        if refused.code == "successor_vanished" and after is not None:
            self._faults.note_cut(after, error)
        elif refused.code == "compute":
            self._faults.note_failed(stream, error)
        else:  # the hop has ended the session; and what it complains of would come again
            self._faults.note_failed(stream, error)
            self._faults.give_up(error)

    def on_lost(self, stream: HopStream, error: PeerError) -> None:
        """Note that a hop is gone."""
        stream.give_up()
        if stream in self.chain.hops:
            self._faults.note_failed(stream, error)

    def on_leaving(self, stream: HopStream, seconds: float) -> None:
        """Have another one take over from a hop that is about to go."""
        logger.info("%s leaves in %.1f s", stream.peer_id, seconds)
        if stream in self.chain.hops:
            self.handovers.replace_leaving(stream)

    # ------------------------------------------------------------------ tasks

    def _note_handover(self, former: HopStream) -> None:
        self.timings.clear()
        self.reporter.replaced([former.peer_id], self.chain.hops, "handover")

    async def watch_receipts(self) -> None:
        """Check receipts as they gather."""
        while True:
            await self._receipts_due.wait()
            self._receipts_due = trio.Event()
            await self.settle()
            self._failover.leave_unwanted()

    async def keep_watch(self) -> None:
        """Find out who shows no sign of life while a step waits."""
        await keep_watch(
            self.chain,
            self._steps,
            after_s=self._config.probe_after_s,
            within_s=self._config.probe_timeout_s,
            on_silent=self.on_lost,
            on_cut=self._faults.note_cut,
        )

    async def leave_relays(self) -> None:
        """Have the streams to hops move to direct connections that come up."""
        await leave_relays(
            self.chain.host, self.session_id, self._movable, self._quiet, self.reporter.left_relay
        )

    def _movable(self) -> list[HopStream]:
        """Hops whose streams may move to other connections: a move waits until nothing is under way."""
        hops = self.chain.hops
        return [*hops] if is_worth_moving(self._prompt_at, hops[0].line) else []

    @asynccontextmanager
    async def _quiet(self) -> AsyncGenerator[None]:
        """No step is under way meanwhile, and nobody is replaced."""
        async with self.handovers.busy, self._steps.quiescent():
            yield

    # ------------------------------------------------------------------ its end

    async def aclose(self, *, keep: bool = False) -> None:
        """End a session of `start_session`; hops are asked to `keep` its cache, or not. Harmless twice."""
        self._keep = keep or self._keep
        self._closing.set()
        await self._closed.wait()

    async def until_closing(self) -> None:
        """Wait until somebody wants the session to end."""
        await self._closing.wait()

    async def end(self) -> None:
        """Tell every hop that the session is over, quickly; quiet about hops that are gone."""
        # The replacement too: it would keep its reservation until its lease ends.
        replacement = self.handovers.break_off()
        await end_all([*self.chain.hops, *(replacement.hops if replacement else ())], keep=self._keep)

    def note_ended(self, error: Exception | None) -> None:
        """Let nobody wait for a result any more; they get `error`, if the session broke on one."""
        last = self.chain.hops[-1].peer_id if self.chain.hops else ""
        was_whole = self._faults.fatal is None
        self._faults.give_up(error or PeerVanished("the session is closed", last))
        assert self._faults.fatal is not None
        self._steps.fail_all(self._faults.fatal)
        self._closed.set()
        why = "closed" if was_whole and error is None else str(self._faults.fatal)
        self.reporter.ended(why, self.failovers)
