"""Passes as work for the batcher, a slice at a time.

A pass goes back into the line after each slice, so that decode steps and prompts of others are computed in
between: they wait for one slice, which is as long as `slice_s` or one block, whichever is longer.

The passes of one session are done one after the other. If they took turns, all of a batch's microbatches
would be ready at about the same time, and one hop of the route would compute while the others wait for it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final

from p2pinfer.errors import PeerError, ProtocolViolation, WrongOutput
from p2pinfer.models.learning.adapter import Adapter
from p2pinfer.models.learning.rows import Rows
from p2pinfer.models.learning.span_passes import (
    Forwarded,
    Gradients,
    Graphs,
    Microbatch,
    Pass,
    SpanPasses,
)
from p2pinfer.models.numerics import Codec
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.tensors import check_finite, encode_hidden
from p2pinfer.node.protocol.train_messages import Backward, Forward
from p2pinfer.node.protocol.train_receipt import PassDigests
from p2pinfer.node.protocol.train_tensors import (
    decode_inputs,
    decode_values,
    digest_of_call,
    encode_vector,
    input_bytes,
)
from p2pinfer.node.serve.worker import BatchReport, Work, Worker
from p2pinfer.reputation.receipt import digest_of

from .kept_inputs import Inputs

BACKWARD_COST: Final = 3  # passes' worth: one forward, and a backward of two products for each


class Passing:
    """Line of one session's passes, and the properties that they share."""

    def __init__(
        self,
        passes: SpanPasses,
        span: BlockSpan,
        codec: Codec,
        client: str,
        worker: Worker,
        slice_s: float,
        claim_thread: Callable[[], None],
    ) -> None:
        self.passes = passes
        self.span = span
        self.codec: Codec = codec
        self.client = client
        self.worker = worker
        self.slice_s = slice_s
        self.claim_thread = claim_thread
        self._line: deque[PassWork] = deque()  # the first one is with the worker
        self._is_closed = False

    def begin(self, work: PassWork) -> None:
        """Have a pass done after those that came before it."""
        self._line.append(work)
        if len(self._line) == 1:
            self.worker.submit(work)

    def end(self, work: PassWork) -> None:
        """Go on with the next pass."""
        ended = self._line.popleft()
        assert ended is work, "passes end in the order in which they began"
        if self._line:
            self.worker.submit(self._line[0])
        elif self._is_closed:
            self.worker.forget(self)

    def close(self) -> None:
        """Begin no pass any more; those in line are not wanted, and end."""
        self._is_closed = True
        if not self._line:
            self.worker.forget(self)

    @property
    def hidden_size(self) -> int:
        """Values of a hidden state."""
        return self.passes.blocks.spec.hidden_size


class PassWork(ABC):
    """One pass, from its arrival to its answer.

    Attributes:
        span: Blocks that it runs.
        lengths: Tokens of each sequence.
        payload: What the answer carries, once the pass is done.
        digests: What its receipt says, once it is sealed.
        inputs: What is kept of it, likewise.
        error: Why it could not be done.
        size: Bytes that it was sent.
    """

    def __init__(
        self,
        passing: Passing,
        request: Forward | Backward,
        payload: bytearray,
        adapter: Adapter | None,
        on_end: Callable[[], None],
    ) -> None:
        """Set up; `on_end` is called in the event loop when the pass is over."""
        self.span = BlockSpan(request.start, request.stop)
        self.lengths: Sequence[int] = request.lengths
        self.size = len(payload)
        self.is_decode = False
        self.payload: tuple[bytes, ...] = ()
        self.digests: PassDigests | None = None
        self.inputs: Inputs | None = None
        self.error: Exception | None = None
        self.is_over = False
        self.is_wanted = True
        self.submitted_at = passing.worker.now
        self.client = passing.client
        self.batch_key: object = self  # it shares a batch with nothing
        self.session: object = passing  # whose other passes wait until this one is over
        self._passing = passing
        self._adapter = adapter
        self._adapter_digest = request.adapter
        self._payload = payload
        self._on_end = on_end
        self._steps: Generator[None, None, None] | None = None
        self._slices_run = 0  # counted by the worker's thread
        self._slices_delivered = 0  # by the event loop

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Share of a slice in the pass, in tokens of a prompt."""

    @abstractmethod
    def _run(self) -> Generator[None, None, None]:
        """Do the pass, with a stop after each block."""

    @abstractmethod
    def _sealed(self) -> PassDigests:
        """Digests of the pass that was done, whose results are finite."""

    def seal(self) -> None:
        """Check the results and take their digests; in any thread, while the worker does the next pass."""
        try:
            self.digests = self._sealed()
        except PeerError as exc:
            self.fail(exc)

    def run(self, batch: Sequence[Any]) -> Sequence[Work]:
        """Do a slice of it."""
        self._slices_run += 1
        if not self.is_wanted:
            self.is_over = True
            return ()
        self._passing.claim_thread()
        until = time.perf_counter() + self._passing.slice_s
        if self._steps is None:
            self._steps = self._run()
        while True:
            try:
                next(self._steps)
            except StopIteration:
                self.is_over = True
                break
            except PeerError as exc:  # what was sent is wrong: nothing for the operator's log
                self.fail(exc)
                break
            if time.perf_counter() >= until:
                break
        return (self,)

    def finish(self) -> None:
        """Have the next slice done, or let go of the pass; its answer was encoded with the last slice."""
        self.is_over = self.is_over or not self.is_wanted
        if self.is_over:
            self._steps = None
        else:
            # From the worker's thread: it would have nothing to do until the event loop came to it.
            self.submitted_at = self._passing.worker.now
            self._passing.worker.submit(self)

    def fail(self, error: Exception) -> None:
        """Take note of what went wrong."""
        self.error = error
        self.is_over = True

    def deliver(self, report: BatchReport) -> None:
        """Have the answer sent after the last slice."""
        self._slices_delivered += 1
        # The pass may be over while an earlier slice is delivered: steps of others came before its last one.
        if self.is_over and self._slices_delivered == self._slices_run:
            self._on_end()
            self._passing.end(self)

    def _microbatch(self, rows: Rows, seed: int) -> Microbatch:
        passing = self._passing
        return Microbatch(self.span, rows.to(passing.passes.blocks.device), self._adapter, seed)

    def _decode(self, payload: bytearray) -> tuple[Rows, Any]:
        passing = self._passing
        return decode_inputs(payload, self.lengths, passing.hidden_size, passing.codec, passing.client)


class ForwardWork(PassWork):
    """A forward pass."""

    def __init__(
        self,
        passing: Passing,
        request: Forward,
        payload: bytearray,
        adapter: Adapter | None,
        on_end: Callable[[], None],
        graph_bytes: int = 0,
    ) -> None:
        """Set up; graphs for the backward pass may take so many bytes."""
        super().__init__(passing, request, payload, adapter, on_end)
        self.request = request
        self._graph_bytes = graph_bytes if request.keeps else 0
        self._rows: Rows | None = None
        self._forwarded: Forwarded | None = None

    @property
    def tokens(self) -> int:
        """See `PassWork`."""
        return -(-sum(self.lengths) // len(self.span))

    def _run(self) -> Generator[None, None, None]:
        self._rows, hidden = self._decode(self._payload)
        passing = self._passing
        batch = self._microbatch(self._rows, self.request.seed)
        graph_bytes, on_card = self._graph_bytes, passing.passes.card_free_bytes
        if on_card is not None:
            graph_bytes = min(graph_bytes, on_card // 4)
        self._forwarded = yield from passing.passes.forward(batch, hidden, graph_bytes)
        self.payload = (encode_hidden(self._forwarded.output, passing.codec),)

    def _sealed(self) -> PassDigests:
        (output,), seed, forwarded = self.payload, self.request.seed, self._forwarded
        assert self._rows is not None and forwarded is not None
        _check_results(output, self._passing.codec, self._passing.client)
        digest = digest_of(self._payload)
        if self.request.keeps:
            self.inputs = Inputs(
                self._rows, forwarded.inputs, digest, self._adapter_digest, seed, forwarded.graphs
            )
        call = digest_of_call(self.lengths, seed, wants_hidden=False)
        return PassDigests(self.span, call, self._adapter_digest, digest, None, digest_of(output))


class BackwardWork(PassWork):
    """A backward pass, over what is kept of the forward pass or over inputs that come again."""

    def __init__(
        self,
        passing: Passing,
        request: Backward,
        payload: bytearray,
        kept: Inputs | None,
        adapter: Adapter | None,
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(passing, request, payload, adapter, on_end)
        self.request = request
        self._kept = kept
        size = input_bytes(sum(self.lengths), passing.hidden_size, passing.codec)
        self._input_size = size if request.sends_inputs else 0  # of what it was sent

    @property
    def tokens(self) -> int:
        """See `PassWork`."""
        return -(-BACKWARD_COST * sum(self.lengths) // len(self.span))

    def _run(self) -> Generator[None, None, None]:
        passing, request, tokens = self._passing, self.request, sum(self.lengths)
        sent = self._payload[self._input_size :]
        gradient = decode_values(sent, tokens, passing.hidden_size, passing.codec, passing.client)
        graphs: Graphs = {}
        if request.sends_inputs:
            rows, hidden = self._decode(self._payload[: self._input_size])
            batch = self._microbatch(rows, request.seed)
            running: Pass[Forwarded] = passing.passes.forward(batch, hidden)
            inputs = (yield from running).inputs
        else:
            assert self._kept is not None
            if self._kept.rows.lengths != tuple(self.lengths) or len(self._kept.blocks) != len(self.span):
                raise ProtocolViolation("another microbatch than that of the forward pass", passing.client)
            batch = self._microbatch(self._kept.rows, request.seed)
            inputs = self._kept.blocks
            if (self._kept.adapter, self._kept.seed) == (self._adapter_digest, request.seed):
                graphs = self._kept.graphs
        gradients: Gradients = yield from passing.passes.backward(
            batch, inputs, gradient, wants_hidden=request.wants_hidden, graphs=graphs
        )
        self.payload = (
            b"" if gradients.hidden is None else encode_hidden(gradients.hidden, passing.codec),
            b"" if gradients.adapter is None else encode_vector(gradients.adapter),
        )

    def _sealed(self) -> PassDigests:
        hidden, vector = self.payload
        _check_results(hidden, self._passing.codec, self._passing.client)
        _check_results(vector, "float32", self._passing.client)
        sent, size = memoryview(self._payload), self._input_size
        return PassDigests(
            self.span,
            digest_of_call(self.lengths, self.request.seed, wants_hidden=self.request.wants_hidden),
            self._adapter_digest,
            digest_of(sent[:size]) if self._kept is None else self._kept.digest,
            digest_of(sent[size:]),
            digest_of(hidden + vector),
        )


def _check_results(payload: bytes, codec: Codec, client: str) -> None:
    """Nothing, if results are finite: a hop signs for no others.

    Raises:
        WrongOutput: They are not, which is a matter of what was sent.
    """
    try:
        check_finite(payload, codec)
    except WrongOutput as exc:
        raise WrongOutput("what was sent leads to values that are not finite", client) from exc
