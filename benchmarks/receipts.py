"""What receipts cost a decode step on a hop and in the client, with and without in one process, taking turns.

    python benchmarks/receipts.py                     # hidden sizes 320, 1024 and 4096, bfloat16
    python benchmarks/receipts.py --hidden 8192 --steps 4000

A step is sent to a real hop whose blocks compute nothing and waited for; `with` hashes, signs and keeps
evidence, `without` does neither. `added cpu` is the event loop's processor time, which depends less on what
else the machine does. `check` is what the client's thread spends on a step of one hop.
`loop` is the longest that hashing a prompt's chunk of 1024 tokens kept the event loop.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from statistics import median
from typing import Any, NamedTuple, cast

import torch
import trio
import trio.testing
from contest import report
from quotient import spread
from torch import Tensor

from p2pinfer.models.compute.runner import Chunk
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.evidence.store import EvidenceStore
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import Open, Result, Step
from p2pinfer.node.protocol.tensors import encode_hidden
from p2pinfer.node.serve.decode_speed import DecodeSpeed
from p2pinfer.node.serve.forward import ServedSpan
from p2pinfer.node.serve.hop_session import HopSession
from p2pinfer.node.serve.quota import CacheRoom
from p2pinfer.node.serve.receipt_signer import ReceiptSigner, SignedReceipt
from p2pinfer.node.serve.worker import Worker, open_worker
from p2pinfer.node.transport.identity import new_identity, verify
from p2pinfer.routing.route import Hop
from p2pinfer.session.receipt_checks import PassedStep, ReceiptBook

SESSION, REVISION = b"s" * 16, "r" * 32
ROUNDS = 9
LIMIT = 1 << 26


class Echo:
    """Blocks that compute nothing."""

    span = BlockSpan(0, 1)

    def run(self, chunks: Sequence[Chunk], span: BlockSpan | None = None) -> list[Tensor]:
        return [chunk.hidden for chunk in chunks]


class Lease:
    def release(self) -> None: ...


class Room:
    lease = Lease()
    filled = 1 << 20


class Spec(NamedTuple):
    hidden_size: int


class Served(NamedTuple):
    """What a `ServedSpan` is, over no model."""

    spec: Spec
    runner: Echo
    worker: Worker
    speed: DecodeSpeed


class Silence(ReceiptSigner):
    """A notary that signs nothing."""

    async def attest(self, step: Step, received: Any, sent: Any, returned: int) -> SignedReceipt:
        return SignedReceipt(b"", b"", b"", b"")


class Nothing(EvidenceStore):
    def add(self, group: bytes, contents: Any, now: float) -> None: ...


@asynccontextmanager
async def open_hop(identity: Any, hidden: int, *, receipts: bool) -> AsyncGenerator[tuple[Any, FrameStream]]:
    opening = Open(SESSION, REVISION, 0, 1, 1 << 20, "bfloat16")
    ours, theirs = trio.testing.memory_stream_pair()
    async with open_worker(4096) as worker, trio.open_nursery() as nursery:
        hop = HopSession(
            opening,
            "client",
            FrameStream(ours, max_payload_bytes=LIMIT, peer_id="client"),
            served=cast(ServedSpan, Served(Spec(hidden), Echo(), worker, DecodeSpeed(1.0))),
            room=cast(CacheRoom, Room()),
            replay=None,
            config=ServeConfig(max_chunk_tokens=4096),
            signer=(ReceiptSigner if receipts else Silence)(opening, "bfloat16", identity.sign),
            evidence=(EvidenceStore if receipts else Nothing)(64 << 20, 900),
        )
        nursery.start_soon(hop.outbox.send_computed)
        yield hop, FrameStream(theirs, max_payload_bytes=LIMIT)
        nursery.cancel_scope.cancel()


async def walk(
    hop: Any, client: FrameStream, rows: Tensor, steps: int, first: int
) -> tuple[float, float, list[Any]]:
    """Seconds a step, those of the event loop's processor, and what went through."""
    hops = (Hop("hop", BlockSpan(0, 1)),)
    passed: list[PassedStep] = []
    spent: list[float] = []
    began = time.thread_time()
    for number in range(first, first + steps):
        payload = encode_hidden(rows, "bfloat16")
        started = time.perf_counter()
        step = Step(number, 0, number, len(rows), 1)
        hop.accept(step, bytearray(payload), hop.neighbours.control)
        message, got = await client.receive()
        spent.append(time.perf_counter() - started)
        assert isinstance(message, Result)
        passed.append(PassedStep(step, hops, payload, got, message.receipts))
    return median(spent), (time.thread_time() - began) / steps, passed


async def longest_pause(hop: Any, client: FrameStream, rows: Tensor, number: int) -> float:
    """Milliseconds for which no other task ran while one large step went through."""
    longest, running = 0.0, True

    async def tick() -> None:
        nonlocal longest
        while running:
            started = time.perf_counter()
            await trio.sleep(0)
            longest = max(longest, time.perf_counter() - started)

    payload = bytearray(encode_hidden(rows, "bfloat16"))
    async with trio.open_nursery() as nursery:
        hop.accept(Step(number, 0, number, len(rows), 1), payload, hop.neighbours.control)
        nursery.start_soon(tick)
        await client.receive()
        running = False
    return longest * 1e3


async def contest(hidden: int, steps: int) -> dict[str, Any]:
    identity = new_identity()
    one, chunk = torch.randn(1, hidden), torch.randn(1024, hidden)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    cpu: dict[bool, list[float]] = {True: [], False: []}
    checks: list[float] = []
    pauses: dict[bool, float] = {}
    async with (
        open_hop(identity, hidden, receipts=True) as loud,
        open_hop(identity, hidden, receipts=False) as silent,
    ):
        for turn in range(ROUNDS):
            for receipts, (hop, client) in ((True, loud), (False, silent)):
                spent, used, passed = await walk(hop, client, one, steps, turn * steps)
                seconds[receipts].append(spent)
                cpu[receipts].append(used)
                if receipts:
                    book = ReceiptBook(SESSION, REVISION, "bfloat16", lambda _, *rest: check(identity, *rest))
                    for each in passed:
                        book.unchecked.append(each)
                    started = time.perf_counter()
                    await book.check()
                    checks.append((time.perf_counter() - started) / steps)
        for receipts, (hop, client) in ((True, loud), (False, silent)):
            pauses[receipts] = await longest_pause(hop, client, chunk, ROUNDS * steps)
    added = [(loud_s - silent_s) * 1e3 for loud_s, silent_s in zip(*seconds.values(), strict=True)]
    return {
        "hidden": hidden,
        "with ms": round(median(seconds[True]) * 1e3, 4),
        "without ms": round(median(seconds[False]) * 1e3, 4),
        "added ms": round((median(seconds[True]) - median(seconds[False])) * 1e3, 4),
        "rounds": spread(added, 4),
        "added cpu ms": round((median(cpu[True]) - median(cpu[False])) * 1e3, 4),
        "check ms": round(median(checks) * 1e3, 4),
        "loop ms": round(pauses[True], 2),
        "loop without ms": round(pauses[False], 2),
    }


def check(identity: Any, payload: bytes, signature: bytes) -> bool:
    return verify(identity.peer_id, payload, signature)


async def main(sizes: Sequence[int], steps: int) -> None:
    rows = [await contest(hidden, steps) for hidden in sizes]
    report("receipts, one hop, one token a step", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, nargs="+", default=[320, 1024, 4096])
    parser.add_argument("--steps", type=int, default=400)
    asked = parser.parse_args()
    trio.run(main, asked.hidden, asked.steps)
