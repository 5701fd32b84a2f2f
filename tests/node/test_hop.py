from __future__ import annotations

from functools import partial
from typing import cast

import torch
import trio
import trio.testing

from p2pinfer.models.cache import CacheLease
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.evidence import EvidenceStore
from p2pinfer.node.hop import HopSession, Refusal
from p2pinfer.node.notary import Notary
from p2pinfer.node.wire import FrameStream, Open, Result, Step
from p2pinfer.node.worker import Done, Job, Worker

from .memory import sign


class Inbox:
    """A worker that only collects."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.released: list[object] = []

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def release(self, lease: object) -> None:
        self.released.append(lease)

    def finish(self) -> None:
        """Compute everything that is not stale: outputs are inputs."""
        for job in self.jobs:
            output = None if job.is_stale() else job.chunk.hidden
            job.on_done(Done(output, None, 0.0, 0.0, 1))
        self.jobs.clear()


def open_hop(worker: Inbox) -> tuple[HopSession, FrameStream]:
    ours, theirs = trio.testing.memory_stream_pair()
    opening = Open(b"s" * 16, "r", 0, 1, 64, "float32")
    session = HopSession(
        opening,
        "client",
        FrameStream(ours, max_payload_bytes=1000, peer_id="client"),
        hidden_size=2,
        lease=cast(CacheLease, object()),
        replay=None,
        worker=cast(Worker, worker),
        config=ServeConfig(max_steps_in_flight=16),
        notary=Notary(opening, "float32", partial(sign, "hop")),
        evidence=EvidenceStore(1 << 20, 900),
    )
    return session, FrameStream(theirs, max_payload_bytes=1000)


def send(session: HopSession, number: int, epoch: int, position: int, tokens: int) -> None:
    session.accept(Step(number, epoch, position, tokens, 1), bytearray(8 * tokens), session.control)


async def test_a_higher_epoch_drops_what_begins_at_or_after_it_and_nothing_before() -> None:
    worker = Inbox()
    session, client = open_hop(worker)
    for number, position in enumerate([0, 4, 6, 8]):
        send(session, number, 0, position, 4 if number == 0 else 2)
    send(session, 4, 1, 6, 2)
    assert [job.is_stale() for job in worker.jobs] == [False, False, True, True, False]
    send(session, 5, 2, 7, 1)
    assert [job.is_stale() for job in worker.jobs] == [False, False, True, True, False, False]
    send(session, 6, 3, 2, 1)
    assert [job.is_stale() for job in worker.jobs] == [False, True, True, True, True, True, False]
    worker.finish()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.forward)
        answered = [(await client.receive())[0] for _ in range(2)]
        assert [message.number for message in answered if isinstance(message, Result)] == [0, 6]
        # With nothing in flight the roll-backs are history: the same positions count again.
        send(session, 7, 3, 3, 1)
        assert not worker.jobs[0].is_stale()
        nursery.cancel_scope.cancel()


async def test_results_for_a_closed_session_go_nowhere() -> None:
    worker = Inbox()
    session, _ = open_hop(worker)
    send(session, 0, 0, 0, 1)
    session.close()
    session.close()
    assert worker.jobs[0].is_stale() and len(worker.released) == 1
    worker.jobs[0].on_done(Done(torch.zeros(1, 2), None, 0.0, 0.0, 1))


async def test_the_first_reason_to_end_counts_and_later_scopes_are_cancelled_too() -> None:
    session, _ = open_hop(Inbox())
    with session.scope():
        session.end(Refusal("protocol", "first"))
        session.end(Refusal("busy", "second"))
        await trio.sleep_forever()
    with session.scope():
        await trio.sleep_forever()
    assert str(session.ended_by) == "first"
