"""The event loop hashes and checks next to nothing: what takes time is done in threads.

Counted is what a single step of a task does between two points where others may run, and not how long it
takes: on a busy machine that says little.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
from blake3 import blake3

from p2pinfer.reputation import receipt as receipts
from p2pinfer.reputation.ledger import Ledger

from .audit.audited_swarm import OpenClient, cheat, noisy, open_client, swarm, text_of
from .node import memory
from .node.memory_swarm import MemorySwarm

__all__ = ["open_client", "swarm"]  # fixtures

HASHED_BYTES = 1 << 17  # two payloads of a decode step, or what is shorter than a thread's hiring; 40 us
CHECKED = 8  # signatures, 50 us each
DECODED = 32  # receipts, 10 us each


class Steps(trio.abc.Instrument):
    """The most that the event loop's thread did of each kind in one step of a task."""

    def __init__(self) -> None:
        self.most: dict[str, int] = {}
        self.in_threads: dict[str, int] = {}
        self._loop = threading.get_ident()
        self._now: dict[str, int] = {}

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._now.clear()

    def count(self, kind: str, amount: int) -> None:
        if threading.get_ident() != self._loop:
            self.in_threads[kind] = self.in_threads.get(kind, 0) + amount
            return
        self._now[kind] = self._now.get(kind, 0) + amount
        self.most[kind] = max(self.most.get(kind, 0), self._now[kind])


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Generator[Steps]:
    """Count hashing, signatures and receipts while the block runs."""
    steps = Steps()

    def counted(kind: str, honest: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            steps.count(kind, size(*arguments))
            return honest(*arguments)

        return call

    monkeypatch.setattr(receipts, "blake3", counted("hashed", blake3, len))
    monkeypatch.setattr(memory, "verify", counted("checked", memory.verify, lambda *_: 1))
    monkeypatch.setattr(receipts, "is_signed_by", counted("checked", receipts.is_signed_by, lambda *_: 1))
    decoder = receipts._decoder  # pyright: ignore[reportPrivateUsage]

    class Decoder:
        decode = staticmethod(counted("decoded", decoder.decode, lambda *_: 1))

    monkeypatch.setattr(receipts, "_decoder", Decoder)
    trio.lowlevel.add_instrument(steps)
    try:
        yield steps
    finally:
        trio.lowlevel.remove_instrument(steps)


async def test_serving_checking_auditing_and_proving_leave_the_loop_alone(
    swarm: MemorySwarm, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of hundreds of KB, many steps, an audit of each hop, a proof, a stranger that checks it."""
    for name, start, stop in (("a", 0, 3), ("b", 3, 5), ("c", 5, 8)):
        served = await swarm.serve(name, start, stop)
        if name == "b":
            cheat(served, noisy)
    prompt = "Once upon a time there was a little fox. " * 25
    with counting(monkeypatch) as steps:
        async with open_client() as stranger, open_client(reputation=Ledger()) as client:
            generation = client.generate(prompt, max_new_tokens=48)
            await text_of(generation)
            await client.audits_settled()
            assert client.ledger.is_banned("b")
            while not stranger.ledger.is_banned("b"):
                await trio.sleep(0.01)
            assert generation.result.prompt_tokens > 200
    assert steps.in_threads["hashed"] > 4 * HASHED_BYTES  # there was something to do
    assert steps.in_threads["checked"] > 4 * CHECKED
    assert steps.in_threads["decoded"] > 4 * DECODED
    assert 0 < steps.most["hashed"] <= HASHED_BYTES
    assert steps.most.get("checked", 0) <= CHECKED
    assert 0 < steps.most["decoded"] <= DECODED
