"""Runs a hop's blocks again and says whether it computed them.

Locally, in float32 and once more as an honest peer might, where the blocks fit; the loaded weights are kept
for the next audit. What is loaded is as much of the model as the memory budget allows, so that one copy
serves every hop, and the logits can be looked at as well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import psutil
import torch
import trio

from p2pinfer.errors import CacheFull, LocalError, ProtocolViolation, WrongOutput
from p2pinfer.models.noise_floor import measure_floor
from p2pinfer.models.source import ModelSource
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify import Reference, Tail, check_rows, compare, open_reference, open_tail
from p2pinfer.node.deposition import Deposition, History, history_of
from p2pinfer.node.verify import check_span
from p2pinfer.reputation.verdict import Finding, Thresholds, Verdict, judge

logger = logging.getLogger(__name__)

BYTES_PER_WEIGHT: Final = 6  # once in float32, once in bfloat16
_COARSE: Final = Thresholds(chunk=8.0, suspect=4.0, shared=32.0, upper=16.0, token=64.0, first=500.0)


class Verifier(Protocol):
    """Says whether a hop computed what it was asked to. `LocalVerifier` is one; users may bring others."""

    async def verify(self, deposition: Deposition) -> Finding:
        """The verdict on what the hop's receipts name. The payloads' digests have been checked."""
        ...


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """How often peers are checked, and what that may take."""

    rate: float | None = (
        None  # share of the hops of sessions to audit, 0 to 1; none: more where less is known
    )
    memory_bytes: int = 0  # for weights to audit with, bytes; 0: a quarter of what is free
    max_tokens: int = 4096  # longer sessions are not run again
    evidence_bytes: int = 64 << 20  # the tensors of one hop in one session; more are not asked for
    timeout_s: float = 60.0  # for one audit, from fetching the evidence to the verdict
    linger_s: float = 10.0  # how long a client that leaves waits for its audits
    remote: bool = True  # ask other peers to run a span again where it does not fit here, or to confirm

    def __post_init__(self) -> None:
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise ValueError(f"rate is {self.rate:g}; it must be from 0 to 1")
        for name in ("max_tokens", "evidence_bytes", "timeout_s", "linger_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be above 0")
        if self.memory_bytes < 0:
            raise ValueError(f"memory_bytes is {self.memory_bytes}; it must not be negative")


class LocalVerifier:
    """A `Verifier` that runs the blocks on this machine's processor, in one thread at a time.

    Attributes:
        spent_s: Processor seconds that re-executions have taken so far, loading weights included.
    """

    def __init__(self, source: ModelSource, config: AuditConfig | None = None) -> None:
        self.spent_s = 0.0
        self._source = source
        self._config = config or AuditConfig()
        self._turn = trio.Lock()  # weights are loaded once, and a reference belongs to one thread
        self._loaded: _Loaded | None = None

    def can_hold(self, span: BlockSpan) -> bool:
        """Whether the blocks fit the budget."""
        return self._cost_of(len(span)) <= self._budget()

    async def verify(self, deposition: Deposition) -> Finding:
        """The verdict; INCONCLUSIVE where the blocks do not fit or cannot be run."""
        return await self._in_turn(lambda: self._verify(deposition, fresh=False))

    async def confirm(self, deposition: Deposition) -> Finding:
        """The same from weights that are loaded anew: what was wrong with ours may have been the memory."""
        return await self._in_turn(lambda: self._verify(deposition, fresh=True))

    async def _in_turn(self, verify: Callable[[], Finding]) -> Finding:
        async with self._turn:
            return await trio.to_thread.run_sync(verify)

    def _verify(self, deposition: Deposition, *, fresh: bool) -> Finding:
        started = time.thread_time()
        try:
            history = history_of(deposition, self._source.spec.hidden_size)
            if len(history.inputs) > self._config.max_tokens:
                return Finding(
                    Verdict.INCONCLUSIVE, f"{len(history.inputs)} tokens are too many to run again"
                )
            if not self.can_hold(deposition.span):
                return Finding(Verdict.INCONCLUSIVE, f"blocks {deposition.span} do not fit the memory budget")
            loaded = self._reference_for(deposition.span, len(history.inputs), fresh=fresh)
            return self._check(loaded, deposition, history)
        except WrongOutput as exc:
            return Finding(Verdict.FAIL, f"the outputs cannot be: {exc}")
        except (ProtocolViolation, LocalError, CacheFull) as exc:
            return Finding(Verdict.INCONCLUSIVE, str(exc))
        finally:
            self.spent_s += time.thread_time() - started

    def _check(self, loaded: _Loaded, deposition: Deposition, history: History) -> Finding:
        return check_span(
            loaded.reference,
            deposition.span,
            history.inputs,
            history.outputs,
            codec=deposition.codec,
            positions=history.positions,
            tail=loaded.tails.get(deposition.span.stop),
        )

    def _reference_for(self, span: BlockSpan, tokens: int, *, fresh: bool) -> _Loaded:
        loaded = self._loaded
        if fresh or loaded is None or not loaded.serves(span, tokens):
            self._loaded = loaded = None  # before the next one is loaded, so that both never are
            self._loaded = loaded = self._load(span, max(tokens, min(1024, self._config.max_tokens)))
        if span.stop not in loaded.tails:
            loaded.tails[span.stop] = self._load_tail(loaded, span)
        return loaded

    def _load(self, span: BlockSpan, max_tokens: int) -> _Loaded:
        everything = BlockSpan(0, self._source.spec.num_blocks)
        wanted = everything if self._cost_of(len(everything)) <= self._budget() else span
        checkpoint = self._source.fetch(wanted, ends=True)
        logger.debug("audit.load blocks=%s tokens=%d", wanted, max_tokens)
        return _Loaded(open_reference(checkpoint, wanted, max_tokens=max_tokens), {})

    def _load_tail(self, loaded: _Loaded, span: BlockSpan) -> Tail | None:
        """What turns the span's outputs into logits: behind the last block that is norm and head only."""
        if span.stop < self._source.spec.num_blocks:
            return None
        checkpoint = self._source.fetch(loaded.reference.span, ends=True)
        return open_tail(checkpoint, span, max_tokens=loaded.reference.max_tokens)

    def _cost_of(self, blocks: int) -> int:
        return blocks * self._source.spec.block_parameters * BYTES_PER_WEIGHT

    def _budget(self) -> int:
        held = self._cost_of(len(self._loaded.reference.span)) if self._loaded else 0
        free: int = psutil.virtual_memory().available
        return self._config.memory_bytes or (free + held) // 4


@dataclass(frozen=True, slots=True)
class _Loaded:
    reference: Reference
    tails: dict[int, Tail | None]  # by the block at which they begin

    def serves(self, span: BlockSpan, tokens: int) -> bool:
        return self.reference.span.covers(span) and tokens <= self.reference.max_tokens


def compare_elsewhere(
    deposition: Deposition, one: Deposition, other: Deposition, hidden_size: int
) -> Finding:
    """The verdict where the blocks fit nowhere here: two peers' outputs stand for the two re-executions.

    Neither is float32, so the unit is the distance of two honest roundings, and where those agree to the bit,
    the rounding of what travels. That is coarser: what it finds to FAIL deviates by far more than honest
    peers do.
    """
    try:
        history = history_of(deposition, hidden_size)
        first, second = history_of(one, hidden_size).outputs, history_of(other, hidden_size).outputs
        outputs = check_rows(history.outputs, len(history.positions), hidden_size, deposition.peer_id)
    except WrongOutput as exc:
        return Finding(Verdict.FAIL, f"the outputs cannot be: {exc}")
    except ProtocolViolation as exc:
        return Finding(Verdict.INCONCLUSIVE, str(exc))
    if not len(history.inputs) == len(first) == len(second):
        return Finding(Verdict.INCONCLUSIVE, "the other peers gave another number of outputs")
    if torch.equal(first, second):
        second = first.bfloat16().float()
    floor = measure_floor(history.inputs, first, [second])
    return judge(compare(floor, outputs, history.positions), _COARSE)
