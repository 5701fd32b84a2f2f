"""Local verifier: runs a hop's blocks again and judges its outputs.

Locally, in float32 and twice more as an honest peer might, where the blocks fit; the loaded weights are kept
for the next audit. What is loaded is the whole model if the memory budget allows, so that one copy serves
every hop; for a proof that somebody else sent it is the span alone, unless that does not settle it. With the
whole model what a hop's outputs do to the logits can be looked at as well: behind the last span always,
since norm and head cost little, behind others on a coin, since it takes four prefills of all that follows.
"""

from __future__ import annotations

import logging
import math
import random
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import trio

from p2pinfer.client_config import AuditConfig
from p2pinfer.errors import CacheFull, LocalError, ModelChanged, ProtocolViolation, WrongOutput
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.source import ModelSource
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead, load_embedding_and_head
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.learning.brought import MARK, BroughtAdapter
from p2pinfer.models.machine.memory import free_memory
from p2pinfer.models.numerics import BFLOAT16, FLOAT32, Numerics, parse_numerics, reference_for
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.glance import glance_at
from p2pinfer.models.verify.reference import Reference, Tail, open_reference, tail_of
from p2pinfer.node.evidence.check import check_pass, check_span
from p2pinfer.node.evidence.end_claims import EndClaims, judge_claims
from p2pinfer.node.evidence.hop_record import History, HopRecord, history_of
from p2pinfer.node.evidence.pass_record import PassRecord, pass_of
from p2pinfer.reputation.verdict import Finding, Thresholds, Verdict, judge_glance

from .verifier import Verifier

logger = logging.getLogger(__name__)

BYTES_PER_WEIGHT: Final = math.ceil(FLOAT32.bytes_per_weight + BFLOAT16.bytes_per_weight)  # held twice
GLANCED_TOKENS: Final = 16  # whose outputs are looked at in the shortest glance
FOLLOWED_TOKENS: Final = 8  # of a glance at the last span, up to their logits
_HEAD_BYTES_PER_WEIGHT: Final = 8  # in float32, to look rows up in and packed for the product


class LocalVerifier(Verifier):
    """A `Verifier` that runs the blocks on this machine's processor, in one thread at a time.

    Args:
        rng: Decides when the logits are looked at; nobody else may know what it will say.

    Attributes:
        spent_s: Processor seconds that re-executions have taken so far, loading weights included.
    """

    def __init__(
        self, source: ModelSource, config: AuditConfig | None = None, *, rng: random.Random | None = None
    ) -> None:
        self.spent_s = 0.0
        self._source = source
        self._config = config or AuditConfig()
        self._rng = rng or random.SystemRandom()
        self._turn = trio.Lock()  # weights are loaded once, and a reference belongs to one thread
        self._loaded: _Loaded | None = None
        self._ends: EmbeddingAndHead | None = None  # for what hops embedded and drew
        self._changed = ""  # why nothing can be loaded any more

    def can_hold(self, span: BlockSpan) -> bool:
        """True if the blocks fit the budget of memory, and are here or nearly so."""
        if self._changed:
            return False
        # To ask for free memory takes milliseconds, a third of a glance; what is loaded fits.
        loaded = self._loaded
        is_here = loaded is not None and loaded.reference.span.covers(span)
        return is_here or (self._cost_of(len(span)) <= self._budget() and self._is_near(span))

    async def verify(self, record: HopRecord) -> Finding:
        """The verdict; INCONCLUSIVE where the blocks do not fit or cannot be run."""
        logits = self._rng.random() < self._config.logits_share
        return await self._in_turn(lambda: self._verify(record, logits=logits))

    async def glance(self, record: HopRecord) -> Finding:
        """PASS where one run shows that the outputs are about right; INCONCLUSIVE where it does not."""
        return await self._in_turn(lambda: self._glance(record))

    async def verify_fully(self, record: HopRecord) -> Finding:
        """As `verify`, and the logits are looked at wherever they can be, if it does not FAIL without."""
        finding = await self._in_turn(lambda: self._verify(record, logits=True, whole=False))
        if finding.verdict is Verdict.FAIL or finding.logits_checked:
            return finding
        return await self._in_turn(lambda: self._verify(record, logits=True))

    def is_thorough(self, finding: Finding) -> bool:
        """True if the logits were looked at: a small change that is well aimed shows only there."""
        return finding.logits_checked

    async def verify_ends(self, record: HopRecord, claims: EndClaims) -> Finding:
        """Embedding and head against the published ones; a FAIL is repeated with weights loaded anew."""
        finding = await self._in_turn(lambda: self._verify_ends(record, claims))
        if finding.verdict is not Verdict.FAIL:
            return finding
        self._ends = None
        return await self._in_turn(lambda: self._verify_ends(record, claims))

    async def confirm(self, record: HopRecord) -> Finding:
        """As `verify`, from weights that are loaded anew: what was wrong may have been our memory."""
        finding = await self._in_turn(lambda: self._verify_anew(record))
        if finding.verdict is Verdict.FAIL:
            return finding
        self._loaded = None  # what it said is not confirmed
        return await self.verify_fully(record)

    async def verify_pass(self, record: PassRecord) -> Finding:
        """The verdict on a pass of training; INCONCLUSIVE where the blocks do not fit or cannot be run."""
        return await self._in_turn(lambda: self._verify_pass(record, anew=False))

    async def confirm_pass(self, record: PassRecord) -> Finding:
        """The same from weights that are loaded anew."""
        finding = await self._in_turn(lambda: self._verify_pass(record, anew=True))
        if finding.verdict is not Verdict.FAIL:
            self._loaded = None  # what it said is not confirmed
        return finding

    async def _in_turn(self, verify: Callable[[], Finding]) -> Finding:
        async with self._turn:
            return await trio.to_thread.run_sync(verify)

    def _verify(self, record: HopRecord, *, logits: bool, whole: bool = True) -> Finding:
        """Judge a record; with `whole`, all of the model is loaded for it if that fits."""

        def check(history: History, numerics: Numerics) -> Finding:
            loaded = self._reference_for(record.span, len(history.inputs), numerics, whole=whole)
            # Behind an inner span of an adapted model there are blocks that its adapter changes as well.
            tail = loaded.tail_behind(record.span, logits=logits and not record.is_adapted)
            return _check(record, history, loaded.reference, tail)

        return self._run(record, check)

    def _verify_ends(self, record: HopRecord, claims: EndClaims) -> Finding:
        def check(history: History, _: Numerics) -> Finding:
            spec = self._source.spec
            if self._ends is None:
                taken = spec.vocab_size * spec.hidden_size * _HEAD_BYTES_PER_WEIGHT
                if taken > self._budget() or not self._is_near(record.span, embedding_and_head=True):
                    return Finding(Verdict.INCONCLUSIVE, "embedding and head do not fit the memory budget")
                self._ends = self._load_ends(self._source.fetch(record.span, embedding_and_head=True))
            return judge_claims(self._ends, claims, history)

        return self._run(record, check)

    @staticmethod
    def _load_ends(checkpoint: Checkpoint) -> EmbeddingAndHead:
        return load_embedding_and_head(checkpoint, ComputeConfig(device="cpu", dtype="float32"))

    def _glance(self, record: HopRecord) -> Finding:
        """Judge a record by one run of a part of it."""

        def look(history: History, numerics: Numerics) -> Finding:
            if len(history.positions) < Thresholds().least_tokens:
                return Finding(Verdict.INCONCLUSIVE, "too few tokens to tell anything at a glance")
            part = draw_beginning(history, self._rng)
            loaded = self._reference_for(record.span, len(history.inputs), numerics, whole=True)
            exact = _adapted(loaded.reference, record).exact
            tail = loaded.tail_behind(record.span, logits=False)
            count = len(part.positions)
            try:
                glance = glance_at(
                    exact,
                    record.span,
                    part.inputs,
                    part.outputs,
                    part.positions,
                    packed=part.packed,
                    ends=None if tail is None else tail.embedding_and_head,
                    followed=self._rng.sample(range(count), min(FOLLOWED_TOKENS, count)),
                )
            except ValueError as exc:
                return Finding(Verdict.INCONCLUSIVE, f"the span could not be run again: {exc}")
            return judge_glance(glance)

        return self._run(record, look)

    def _verify_anew(self, record: HopRecord) -> Finding:
        """Judge a record by norms alone, from the blocks in question."""

        def check(history: History, numerics: Numerics) -> Finding:
            checkpoint = self._source.fetch(record.span, embedding_and_head=False)
            reference = open_reference(
                checkpoint, record.span, max_tokens=len(history.inputs), numerics=numerics
            )
            return _check(record, history, reference, None)

        return self._run(record, check)

    def _verify_pass(self, record: PassRecord, *, anew: bool) -> Finding:
        def check(numerics: Numerics) -> Finding:
            if anew:
                checkpoint = self._source.fetch(record.span, embedding_and_head=False)
                reference = open_reference(checkpoint, record.span, max_tokens=1, numerics=numerics)
            else:
                reference = self._reference_for(record.span, 1, numerics, whole=True).reference
            architecture = reference.exact.architecture
            history = pass_of(record, architecture, max_tokens=self._config.max_tokens)
            return check_pass(reference, record, history)

        return self._guarded(record.receipt.revision, record.receipt.dtype, record.span, check)

    def _run(self, record: HopRecord, check: Callable[[History, Numerics], Finding]) -> Finding:
        def run(numerics: Numerics) -> Finding:
            spec = self._source.spec
            tokens = min(self._config.max_tokens, spec.max_positions)
            history = history_of(record, spec.hidden_size, max_tokens=tokens)
            if not len(history.inputs):
                return Finding(Verdict.INCONCLUSIVE, "there is nothing to run again")
            return check(history, numerics)

        revision = record.revision if record.adapter is None else record.revision.partition(MARK)[0]
        return self._guarded(revision, record.receipts[0].dtype, record.span, run)

    def _guarded(
        self, revision: str, dtype: str, span: BlockSpan, check: Callable[[Numerics], Finding]
    ) -> Finding:
        """The finding of `check`, or why it could not be made, with the time that it took."""
        started = time.thread_time()
        finding = self._try(revision, dtype, span, check)
        spent_s = time.thread_time() - started
        self.spent_s += spent_s
        return replace(finding, spent_s=spent_s)

    def _try(
        self, revision: str, dtype: str, span: BlockSpan, check: Callable[[Numerics], Finding]
    ) -> Finding:
        """The finding of `check`, which is given the numerics of the reference for `dtype`."""
        try:
            spec = self._source.spec
            if revision != spec.revision:
                return Finding(Verdict.INCONCLUSIVE, "the receipts are of another model than is here")
            numerics = reference_for(parse_numerics(dtype))
            if numerics is None:
                return Finding(Verdict.INCONCLUSIVE, f"the receipts name {dtype}, which is not computed here")
            spec.check_span(span)  # whoever made a proof may have signed for any
            if self._changed:
                return Finding(Verdict.INCONCLUSIVE, self._changed)
            if not self.can_hold(span):
                return Finding(Verdict.INCONCLUSIVE, f"blocks {span} do not fit the memory budget")
            return check(numerics)
        except WrongOutput as exc:
            return Finding(Verdict.FAIL, f"the outputs cannot be: {exc}")
        except ModelChanged as exc:
            self._changed = str(exc)
            logger.warning("peers can no longer be audited against this model: %s", exc)
            return Finding(Verdict.INCONCLUSIVE, self._changed)
        except (ProtocolViolation, LocalError, CacheFull) as exc:
            return Finding(Verdict.INCONCLUSIVE, str(exc))
        except (MemoryError, RuntimeError) as exc:  # torch's own: no text should end for want of memory here
            return Finding(Verdict.INCONCLUSIVE, f"the blocks could not be run here: {exc}")

    def _reference_for(self, span: BlockSpan, tokens: int, numerics: Numerics, *, whole: bool) -> _Loaded:
        loaded = self._loaded
        everything = BlockSpan(0, self._source.spec.num_blocks)
        if loaded and loaded.serves(everything, tokens, numerics, embedding_and_head=True):
            return loaded
        wanted, with_head = self._wanted(span, whole=whole)
        if loaded is None or not loaded.serves(wanted, tokens, numerics, embedding_and_head=with_head):
            self._loaded = loaded = None  # before the next one is loaded, so that both never are
            tokens = max(tokens, min(1024, self._config.max_tokens))
            self._loaded = loaded = self._load(wanted, tokens, numerics, embedding_and_head=with_head)
        return loaded

    def _wanted(self, span: BlockSpan, *, whole: bool) -> tuple[BlockSpan, bool]:
        """The blocks to load for a look at `span`, and whether norm and head are among it."""
        spec, budget = self._source.spec, self._budget()
        head_bytes = spec.vocab_size * spec.hidden_size * _HEAD_BYTES_PER_WEIGHT
        everything = BlockSpan(0, spec.num_blocks)
        fits = self._cost_of(spec.num_blocks) + head_bytes <= budget
        wanted = everything if whole and fits and self._is_near(everything, embedding_and_head=True) else span
        with_head = wanted.stop == spec.num_blocks and self._is_near(wanted, embedding_and_head=True)
        return wanted, with_head and self._cost_of(len(wanted)) + head_bytes <= budget

    def _load(
        self, span: BlockSpan, max_tokens: int, numerics: Numerics, *, embedding_and_head: bool
    ) -> _Loaded:
        logger.debug(
            "audit.load blocks=%s embedding_and_head=%s tokens=%d", span, embedding_and_head, max_tokens
        )
        checkpoint = self._source.fetch(span, embedding_and_head=embedding_and_head)
        return _Loaded(
            open_reference(checkpoint, span, max_tokens=max_tokens, numerics=numerics),
            self._load_ends(checkpoint) if embedding_and_head else None,
        )

    def _is_near(self, span: BlockSpan, *, embedding_and_head: bool = False) -> bool:
        return (
            self._source.missing_bytes(span, embedding_and_head=embedding_and_head)
            <= self._config.download_bytes
        )

    def _cost_of(self, blocks: int) -> int:
        return blocks * self._source.spec.block_parameters * BYTES_PER_WEIGHT

    def _budget(self) -> int:
        held = self._cost_of(len(self._loaded.reference.span)) if self._loaded else 0
        return self._config.memory_bytes or (free_memory().bytes + held) // 4


def draw_beginning(history: History, rng: random.Random) -> History:
    """A session up to a position that is drawn evenly, with outputs of `GLANCED_TOKENS` positions at least.

    A glance takes half the time so, and there are twice as many. What is wrong everywhere is met twice as
    often. What is wrong from some position on is met as often as that part of the session is long: a hop that
    lies late only gains nothing by it, counted in tokens that it spoils until it is found.
    """
    shortest = history.positions[min(GLANCED_TOKENS, len(history.positions)) - 1] + 1
    tokens = rng.randint(shortest, max(shortest, len(history.inputs)))
    seen = bisect_left(history.positions, tokens)
    return History(history.inputs[:tokens], history.outputs[:seen], history.positions[:seen], history.packed)


@dataclass(frozen=True, slots=True)
class _Loaded:
    reference: Reference
    embedding_and_head: EmbeddingAndHead | None

    def serves(self, span: BlockSpan, tokens: int, numerics: Numerics, *, embedding_and_head: bool) -> bool:
        covers = self.reference.span.covers(span) and (
            self.embedding_and_head is not None or not embedding_and_head
        )
        return covers and self.reference.numerics == numerics and tokens <= self.reference.max_tokens

    def tail_behind(self, span: BlockSpan, *, logits: bool) -> Tail | None:
        """Blocks and head after the span, if they are at hand and asked for or cheap."""
        blocks = self.reference.spec.num_blocks
        if self.embedding_and_head is None or not (logits or span.stop == blocks):
            return None
        return (
            tail_of(self.reference, self.embedding_and_head, span.stop)
            if self.reference.span.stop == blocks
            else None
        )


def _check(record: HopRecord, history: History, reference: Reference, tail: Tail | None) -> Finding:
    return check_span(
        _adapted(reference, record),
        record.span,
        history.inputs,
        history.outputs,
        codec=record.codec,
        positions=history.positions,
        packed=history.packed,
        tail=tail,
    )


def _adapted(reference: Reference, record: HopRecord) -> Reference:
    """The reference for what the hop was to run: with the adapter, where there is one."""
    if record.adapter is None:
        return reference
    return reference.adapted(BroughtAdapter(record.adapter, reference.exact.architecture, record.span))
