"""Trainer: microbatches through the hops of a route and back, whoever of them dies on the way.

The client stands between the hops: it sends each of them its input and gets its output. So it can hold every
hop's receipt against both, and has all that a replacement needs. A forward pass leaves a trace of what went
into each hop; a backward pass follows it from its end. Where a hop is gone, its part of the trace is run
again on another one, from the input that the client has, and the backward pass goes on there. Whatever a hop
returned counts once, with the answer that completes its part: so no gradient is added twice.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
import trio
from torch import Tensor

from p2pinfer.errors import LocalError, PeerError
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.learning.rows import Rows
from p2pinfer.models.numerics import Codec
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.concurrency.nurseries import bare_errors, open_nursery
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.tensors import encode_hidden
from p2pinfer.node.protocol.train_stream import FirstPart
from p2pinfer.node.protocol.train_tensors import encode_inputs
from p2pinfer.routing.route import Route

from .pass_receipts import Call
from .pass_watch import PassWatch
from .train_link import TrainLink
from .train_route import Routes, TrainRoute
from .trained_adapter import AdapterGradient, ModelAdapter

logger = logging.getLogger(__name__)

MICROBATCH_TOKENS: Final = 1024  # a larger one gains nothing more from a hop's products
LEAST_TOKENS: Final = 256  # of a microbatch that is cut so that every hop has one: below, products get slower
WAIT_S: Final = 60.0  # for somebody to take over blocks that nobody serves
MOST_FAILURES: Final = 12  # of hops in one microbatch, after which it is not theirs


@dataclass(frozen=True, slots=True)
class Batch:
    """Hidden states of sequences, side by side, and the positions of their tokens.

    Attributes:
        rows: The sequences.
        hidden: (tokens, hidden_size), any float dtype.
    """

    rows: Rows
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class _Segment:
    """One hop's part of a microbatch's way."""

    link: TrainLink
    number: int  # of the forward pass at that hop
    call: Call


@dataclass(slots=True)
class Trace:
    """A forward pass that a backward pass can follow.

    Attributes:
        span: The blocks.
        output: (tokens, hidden_size) in the batch's dtype, of all microbatches.
    """

    span: BlockSpan
    output: Tensor
    adapter: ModelAdapter | None
    microbatches: list[tuple[slice, list[_Segment]]]


# Gradients of a hop's input, if it was wanted, and of its part of the adapter, if it has one.
_Returned: TypeAlias = tuple[Tensor | None, Tensor | None]


class SwarmTrainer:
    """Passes over the whole model, or a part of it. Made by `open_trainer`; one task or many may use it."""

    def __init__(self, spec: ModelSpec, route: TrainRoute) -> None:
        self._spec = spec
        self._route = route

    @property
    def route(self) -> Route:
        """Peers that compute at the moment."""
        return Route(tuple(link.hop for link in self._route.links))

    # ------------------------------------------------------------------ passes

    async def forward(
        self,
        batch: Batch,
        adapter: ModelAdapter | None = None,
        *,
        span: BlockSpan | None = None,
        keeps: bool = True,
        seed: int = 0,
    ) -> Trace:
        """Run blocks over a batch, cut into microbatches that are under way at the same time.

        Args:
            span: The blocks; all of them by default.
            keeps: False if no backward pass will follow.
            seed: Of dropout; 0: none. The same seed drops the same.

        Raises:
            LocalError: A sequence is longer than a hop takes, or values are not finite.
            NoRoute: Nobody serves some of the blocks, and nobody came within the time that is waited.
        """
        part = BlockSpan(0, self._spec.num_blocks) if span is None else span
        self._spec.check_span(part)
        await _check_finite(batch.hidden, "a hidden state")
        await self._route.mend()
        cuts = self._cuts(batch.rows)
        outputs: list[Tensor] = [torch.empty(0)] * len(cuts)
        ways: list[list[_Segment]] = [[] for _ in cuts]

        async def run(index: int) -> None:
            where, rows = cuts[index]
            number = (seed * 4096 + index) % (1 << 32) if seed else 0
            outputs[index], ways[index] = await self._run(
                rows, batch.hidden[where], adapter, part, number, keeps=keeps
            )

        await _all_at_once(run, len(cuts), 2 * len(self._route.links) + 1)
        output = torch.cat(outputs).to(batch.hidden.dtype)
        return Trace(part, output, adapter, [(cut[0], way) for cut, way in zip(cuts, ways, strict=True)])

    async def backward(
        self, trace: Trace, gradient: Tensor, *, wants_hidden: bool = True
    ) -> tuple[Tensor | None, AdapterGradient | None]:
        """Gradients of a batch's hidden states and of its adapter, of a loss with `gradient` in the output.

        Args:
            gradient: (tokens, hidden_size).
            wants_hidden: False if the gradient of the hidden states is of no use.

        Raises:
            LocalError: The gradient is not finite.
            NoRoute: As for `forward`.
        """
        await _check_finite(gradient, "a gradient")
        total = None if trace.adapter is None else trace.adapter.gradient()
        hidden = torch.zeros_like(gradient) if wants_hidden else None
        adding = trio.CapacityLimiter(1)

        def add(where: slice, found: Tensor | None, parts: Sequence[tuple[BlockSpan, Tensor]]) -> None:
            if hidden is not None and found is not None:
                hidden[where] = found.to(hidden.dtype)
            if total is not None:
                for span, vector in parts:
                    total.add(span, vector)

        async def run(index: int) -> None:
            where, way = trace.microbatches[index]
            found, parts = await self._run_back(trace, way, gradient[where], wants_hidden=wants_hidden)
            # In one piece, which nothing interrupts once it has begun: a microbatch counts whole, and once.
            await trio.to_thread.run_sync(add, where, found, parts, limiter=adding)

        await _all_at_once(run, len(trace.microbatches), 2 * len(self._route.links) + 1)
        return hidden, total

    async def forget(self, trace: Trace) -> None:
        """Let hops keep nothing for a backward pass that will not come."""
        for _, way in trace.microbatches:
            for segment in way:
                await segment.link.forget(segment.number)

    async def _run(
        self,
        rows: Rows,
        hidden: Tensor,
        adapter: ModelAdapter | None,
        span: BlockSpan,
        seed: int,
        *,
        keeps: bool,
    ) -> tuple[Tensor, list[_Segment]]:
        """Hidden states after `span`, and the way there."""
        way: list[_Segment] = []
        at, failures = span.start, 0
        while at < span.stop:
            link = await self._route.link_at(at)
            part = BlockSpan(at, min(span.stop, link.hop.span.stop))
            call = await trio.to_thread.run_sync(self._call, link, part, rows, hidden, adapter, seed)
            try:
                number, hidden = await link.forward(call, keeps=keeps)
            except PeerError as exc:
                failures += 1
                self._route.drop(link, exc)
                if failures > MOST_FAILURES:
                    raise
                continue
            way.append(_Segment(link, number, call))
            at = part.stop
        return hidden, way

    def _call(
        self,
        link: TrainLink,
        part: BlockSpan,
        rows: Rows,
        hidden: Tensor,
        adapter: ModelAdapter | None,
        seed: int,
    ) -> Call:
        """A microbatch as a hop is sent it; in a thread, since megabytes are copied and hashed."""
        own = None if adapter is None else adapter.part(link.hop.span)
        return Call(part, rows, encode_inputs(rows, hidden, link.codec), own, seed)

    async def _run_back(
        self, trace: Trace, way: list[_Segment], gradient: Tensor, *, wants_hidden: bool
    ) -> tuple[Tensor | None, list[tuple[BlockSpan, Tensor]]]:
        """Gradient of a microbatch's input, and of each hop's part of the adapter."""
        left = list(way)
        parts: list[tuple[BlockSpan, Tensor]] = []
        current: Tensor | None = gradient
        failures = 0
        while _is_of_use(left, wants_hidden=wants_hidden):
            assert current is not None
            returned, failure = await self._follow(left, current, wants_hidden=wants_hidden)
            for hidden, vector in returned:
                current, link = hidden, left.pop().link
                if vector is not None:
                    parts.append((link.hop.span, vector))
            if failure is not None:
                lost = left.pop()
                failures += 1
                self._route.drop(lost.link, failure)
                if failures > MOST_FAILURES:
                    raise failure
                left += await self._again(trace, lost)
        return current, parts

    async def _follow(
        self, way: Sequence[_Segment], gradient: Tensor, *, wants_hidden: bool
    ) -> tuple[list[_Returned], PeerError | None]:
        """Gradients that the hops of a way return, its last one first, up to one that fails, and the reason.

        A hop is asked as soon as the gradient of the hidden states is here from the one behind it. The
        receipt is about that and the adapter's, which may be longer and comes after it. So what follows from
        a gradient whose hop then fails does not count.
        """
        segment, before = way[-1], way[:-1]
        goes_on = _is_of_use(before, wants_hidden=wants_hidden)
        link, tokens = segment.link, segment.call.rows.tokens
        first = FirstPart(link.hidden_bytes(tokens)) if goes_on else None
        further: list[_Returned] = []
        failure: PeerError | None = None
        further_failure: PeerError | None = None

        async def go_on(first: FirstPart) -> None:
            nonlocal further, further_failure
            await first.known.wait()
            if first.content is None:
                return
            try:
                hidden = await trio.to_thread.run_sync(link.hidden_of, first.content)
            except PeerError:
                return  # the check of the whole answer says so
            further, further_failure = await self._follow(before, hidden, wants_hidden=wants_hidden)

        with bare_errors():
            async with trio.open_nursery() as nursery:
                if first is not None:
                    nursery.start_soon(go_on, first)
                try:
                    sent = await trio.to_thread.run_sync(_encoded, gradient, link.codec)
                    answer = await link.backward(
                        segment.call,
                        segment.number,
                        sent,
                        wants_hidden=wants_hidden or goes_on,
                        first=first,
                    )
                except PeerError as exc:
                    # Whoever was asked meanwhile answers: to give up half a request would break a session.
                    answer, failure = None, exc
                finally:
                    if first is not None:
                        first.settle()
        return ([], failure) if answer is None else ([answer, *further], further_failure)

    async def _again(self, trace: Trace, lost: _Segment) -> list[_Segment]:
        """The part of a lost hop, run by others from the same input."""
        call = lost.call
        _, way = await self._run(
            call.rows, call.hidden(lost.link.codec), trace.adapter, call.span, call.seed, keeps=True
        )
        return way

    def _cuts(self, rows: Rows) -> list[tuple[slice, Rows]]:
        """Microbatches of whole sequences, one for each hop or more, and where their tokens lie."""
        most = min(link.limits.max_tokens for link in self._route.links)
        if max(rows.lengths) > most:
            raise LocalError(
                f"a sequence of {max(rows.lengths)} tokens; the hops of this route take {most} at once "
                "(serve.train_tokens of their nodes): cut the texts"
            )
        share = max(LEAST_TOKENS, -(-rows.tokens // len(self._route.links)))
        size = min(most, MICROBATCH_TOKENS, share)
        cuts: list[tuple[slice, Rows]] = []
        start, at, lengths = 0, 0, list[int]()
        for length in (*rows.lengths, 0):
            if lengths and (not length or at + length - start > size):
                part = slice(start, at)
                cuts.append((part, Rows(lengths, rows.positions[part], rows.indices[part])))
                start, lengths = at, []
            lengths.append(length)
            at += length
        return cuts


@asynccontextmanager
async def open_trainer(
    host: Network,
    spec: ModelSpec,
    routes: Routes,
    table_changed: Callable[[], trio.Event],
    wait_s: float = WAIT_S,
    watch: PassWatch | None = None,
) -> AsyncGenerator[SwarmTrainer]:
    """A trainer for as long as the block runs; hops are linked with the first pass.

    Args:
        wait_s: How long blocks may be served by nobody.
        watch: Is shown every pass, and says which hops are not wanted any more.
    """
    async with open_nursery() as nursery:
        route = TrainRoute(host, spec, routes, nursery, table_changed, wait_s, watch)
        try:
            yield SwarmTrainer(spec, route)
        finally:
            with trio.CancelScope(shield=True):
                await route.close()


async def _all_at_once(run: Callable[[int], Awaitable[None]], count: int, most: int) -> None:
    """Await `run` of 0, 1, ... up to `count`, at most so many at a time."""
    limiter = trio.CapacityLimiter(most)

    async def one(index: int) -> None:
        async with limiter:
            await run(index)

    with bare_errors():
        async with trio.open_nursery() as nursery:
            for index in range(count):
                nursery.start_soon(one, index)


def _is_of_use(way: Sequence[_Segment], *, wants_hidden: bool) -> bool:
    """True if a gradient has to go back over these hops."""
    return bool(way) and (wants_hidden or any(each.call.adapter for each in way))


def _encoded(hidden: Tensor, codec: Codec) -> bytes:
    return encode_hidden(hidden, codec)


async def _check_finite(values: Tensor, what: str) -> None:
    if not await trio.to_thread.run_sync(lambda: bool(torch.isfinite(values).all())):
        raise LocalError(f"{what} that is not finite: the training has diverged")
