"""What a local verifier takes upon itself, and what it leaves to others."""

from __future__ import annotations

import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from p2pinfer import models
from p2pinfer.audit.local_verifier import BYTES_PER_WEIGHT, LocalVerifier
from p2pinfer.audit.opinions import compare_elsewhere
from p2pinfer.audit.second_opinion import choose_auditors
from p2pinfer.client_config import AuditConfig
from p2pinfer.errors import ConfigError
from p2pinfer.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.checkpoint.model_source import Missing
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL, ModelSource, resolve_model
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import Chunk, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.machine.memory import FreeMemory, free_memory
from p2pinfer.models.numerics import Numerics
from p2pinfer.models.pieces.manifest import Holdings
from p2pinfer.models.progress import Progress
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.reference import Reference, open_reference
from p2pinfer.models.verify.sessions import run_session
from p2pinfer.node.evidence.hop_record import HopRecord
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.receipt import NO_RECEIPT, RECEIPT_VERSION, Payload, Receipt, digest_of
from p2pinfer.reputation.verdict import Verdict
from p2pinfer.routing.announcement import Announcement

SPAN = BlockSpan(2, 4)


class Distant:
    """A model of which a gigabyte a block would have to be fetched."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source

    @property
    def spec(self) -> ModelSpec:
        return self._source.spec

    def fetch(
        self, span: BlockSpan | None, *, embedding_and_head: bool, progress: Progress | None = None
    ) -> Checkpoint:
        raise AssertionError(f"{span} was fetched")

    def fetch_words(self, *, progress: Progress | None = None) -> Path:
        raise AssertionError("no text is read here")

    def missing_bytes(self, span: BlockSpan | None, *, embedding_and_head: bool) -> int:
        return len(span or ()) << 30

    def missing(self, span: BlockSpan | None, *, embedding_and_head: bool) -> Missing:
        raise AssertionError("nothing is to be fetched")

    def holdings(self) -> Holdings:
        raise AssertionError("nothing is given away")


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return resolve_model(BUNDLED_MODEL, cache_dir=tmp_path)


def identity_over(span: BlockSpan, tokens: int = 12) -> HopRecord:
    """A hop that sends back what it got, and signs for it."""
    payload: Payload = bytes(range(64)) * (20 * tokens)  # float32, of 320 channels
    return record_of(span, payload, payload, tokens)


@cache
def bundled_revision() -> str:
    return open_checkpoint(Path(models.__path__[0]) / BUNDLED_MODEL, BUNDLED_MODEL).spec.revision


def record_of(
    span: BlockSpan, given: Payload, got: Payload, tokens: int, revision: str = "", dtype: str = "float32"
) -> HopRecord:
    receipt = Receipt(
        RECEIPT_VERSION, bytes(16), 0, NO_RECEIPT, revision or bundled_revision(), span.start, span.stop, 0,
        tokens, tokens, 0, dtype, "float32", digest_of(given), digest_of(got), bytes(16),
    )  # fmt: skip
    return HopRecord("hop", (), (receipt,), {digest_of(given): given, digest_of(got): got})


@pytest.fixture(scope="module")
def honest(tiny_stories: Path) -> tuple[Tensor, list[Tensor]]:
    """What a span is given, and what it makes of it in float32 and, twice, in bfloat16; (40, 320) each."""
    checkpoint = open_checkpoint(tiny_stories, BUNDLED_MODEL)
    reference = open_reference(checkpoint, BlockSpan(0, 4), max_tokens=64)
    ends = load_embedding_and_head(checkpoint, ComputeConfig(device="cpu", dtype="float32"))
    inputs = run_session(reference.exact, ends.embed(list(range(100, 140))), BlockSpan(0, SPAN.start))
    runners = (reference.exact, *reference.rounded)
    return inputs, [run_session(runner, inputs, SPAN) for runner in runners]


def computed(inputs: Tensor, outputs: Tensor) -> HopRecord:
    return record_of(SPAN, inputs.numpy().tobytes(), outputs.contiguous().numpy().tobytes(), len(inputs))


async def test_weights_are_not_downloaded_for_the_sake_of_an_audit(source: ModelSource) -> None:
    verifier = LocalVerifier(Distant(source), AuditConfig(memory_bytes=1 << 40))
    assert verifier.can_hold(BlockSpan(0, 1))
    assert not verifier.can_hold(SPAN)
    finding = await verifier.verify(identity_over(SPAN))
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert LocalVerifier(Distant(source), AuditConfig(memory_bytes=1 << 40, download_bytes=2 << 30)).can_hold(
        SPAN
    )


@pytest.mark.parametrize("share", [0.0, 1.0])
async def test_logits_behind_inner_spans_are_looked_at_as_often_as_is_said(
    source: ModelSource, share: float
) -> None:
    """And not where norms have settled it."""
    verifier = LocalVerifier(source, AuditConfig(logits_share=share))
    finding = await verifier.verify(identity_over(SPAN))
    assert finding.verdict is Verdict.FAIL
    assert not finding.logits_checked
    assert (await verifier.confirm(identity_over(SPAN))).verdict is Verdict.FAIL


async def test_a_glance_passes_the_truth_and_leaves_lies_to_a_closer_look(
    source: ModelSource, honest: tuple[Tensor, list[Tensor]]
) -> None:
    verifier, (inputs, runs) = LocalVerifier(source), honest
    spent_s = 0.0
    for run in runs:
        finding = await verifier.glance(computed(inputs, run))
        assert (finding.verdict, finding.deviation) == (Verdict.PASS, None)
        assert not finding.logits_checked
        assert finding.spent_s > 0
        spent_s += finding.spent_s
    for lie in (inputs, runs[0] * 1.1, torch.zeros_like(inputs)):
        finding = await verifier.glance(computed(inputs, lie))
        assert finding.verdict is Verdict.INCONCLUSIVE
        spent_s += finding.spent_s
    assert verifier.spent_s == pytest.approx(spent_s)
    for strange in (identity_over(BlockSpan(7, 9)), identity_over(SPAN, 0)):
        assert (await verifier.glance(strange)).verdict is Verdict.INCONCLUSIVE


async def test_free_memory_is_not_asked_for_again_once_the_model_is_loaded(
    source: ModelSource, honest: tuple[Tensor, list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took a third of a glance."""
    asked: list[FreeMemory] = []

    def count() -> FreeMemory:
        asked.append(free_memory())
        return asked[-1]

    monkeypatch.setattr("p2pinfer.audit.local_verifier.free_memory", count)
    verifier, record = LocalVerifier(source), computed(honest[0], honest[1][1])
    assert verifier.can_hold(SPAN)
    assert (await verifier.verify(record)).verdict is Verdict.PASS
    loaded = len(asked)
    assert loaded > 0
    assert verifier.can_hold(SPAN) and verifier.can_hold(BlockSpan(0, 8))
    for look in (verifier.glance, verifier.verify):
        assert (await look(record)).verdict is Verdict.PASS
    assert len(asked) == loaded


async def test_without_room_for_the_model_the_span_alone_is_loaded(source: ModelSource) -> None:
    room = 2 * source.spec.block_parameters * BYTES_PER_WEIGHT
    verifier = LocalVerifier(source, AuditConfig(memory_bytes=room, logits_share=1.0))
    for span in (SPAN, BlockSpan(6, 8)):
        finding = await verifier.verify(identity_over(span))
        assert finding.verdict is Verdict.FAIL
        assert not finding.logits_checked
    assert verifier.spent_s > 0


@pytest.mark.parametrize("span", [BlockSpan(8, 9), BlockSpan(7, 9), BlockSpan(0, 1 << 16)])
async def test_blocks_that_the_model_has_not_prove_nothing(source: ModelSource, span: BlockSpan) -> None:
    verifier = LocalVerifier(source)
    for verify in (verifier.verify, verifier.verify_fully, verifier.confirm):
        finding = await verify(identity_over(span))
        assert finding.verdict is Verdict.INCONCLUSIVE


async def test_receipts_of_another_model_prove_nothing(source: ModelSource) -> None:
    """A client that came back to a folder that was written anew, say."""
    payload = bytes(range(64)) * 240
    other = record_of(SPAN, payload, payload, 12, revision="f" * 32)
    verifier = LocalVerifier(source)
    for verify in (verifier.verify, verifier.verify_fully, verifier.confirm):
        finding = await verify(other)
        assert (finding.verdict, finding.reason) == (
            Verdict.INCONCLUSIVE,
            "the receipts are of another model than is here",
        )


@pytest.mark.parametrize("dtype", ["int2_bfloat16", "bfloat16_float32", "what_is_this"])
async def test_receipts_that_name_what_is_not_computed_here_prove_nothing(
    source: ModelSource, dtype: str
) -> None:
    """The very same outputs FAIL under numerics that a reference is for."""
    payload = bytes(range(64)) * 240
    verifier = LocalVerifier(source)
    for verify in (verifier.verify, verifier.verify_fully, verifier.confirm):
        finding = await verify(record_of(SPAN, payload, payload, 12, dtype=dtype))
        assert (finding.verdict, finding.reason) == (
            Verdict.INCONCLUSIVE,
            f"the receipts name {dtype}, which is not computed here",
        )
        known = await verify(record_of(SPAN, payload, payload, 12, dtype="bfloat16"))
        assert known.verdict is Verdict.FAIL


def test_a_reference_for_what_is_not_computed_here_cannot_be_opened(tiny_stories: Path) -> None:
    checkpoint = open_checkpoint(tiny_stories, BUNDLED_MODEL)
    with pytest.raises(ConfigError, match="unknown dtype 'bfloat16_float32'"):
        open_reference(checkpoint, SPAN, max_tokens=64, numerics=Numerics("bfloat16", "float32"))


@pytest.mark.slow
@pytest.mark.parametrize(("named", "liars"), [("int8", ("auto", "int4")), ("int4", ("auto", "nf4"))])
async def test_a_quantised_peer_is_believed_in_its_own_format_and_in_no_other(
    source: ModelSource, tiny_stories: Path, named: str, liars: tuple[str, ...]
) -> None:
    """Steps and prompts of a real runner, and of liars that compute in more bits, or fewer, than they say."""
    checkpoint = open_checkpoint(tiny_stories, BUNDLED_MODEL)
    ends = load_embedding_and_head(checkpoint, ComputeConfig(device="cpu", dtype="float32"))
    given = ends.embed(random.Random(1).sample(range(100, 4000), 65)).bfloat16().float()
    verifier = LocalVerifier(source, AuditConfig(logits_share=0.0))
    for weights in (named, *liars):
        config = ComputeConfig(
            device="cpu", dtype="bfloat16", weights=weights, threads=1, cache_bytes=1 << 22
        )
        runner = open_runner(checkpoint, SPAN, config)
        runs = [run_session(runner, given, SPAN)]
        if weights == named:
            lease = runner.cache.reserve(len(given))
            runs.append(
                torch.cat([runner.run([Chunk(lease, at, given[at : at + 1])])[0] for at in range(len(given))])
            )
        for outputs in runs:
            sent, got = (each.float().contiguous().numpy().tobytes() for each in (given, outputs))
            record = record_of(SPAN, sent, got, len(given), dtype=f"{named}_bfloat16")
            finding = await verifier.verify(record)
            expected = Verdict.PASS if weights == named else Verdict.FAIL
            assert finding.verdict is expected, (weights, finding.reason)


def test_peers_of_other_numerics_are_no_second_opinion(honest: tuple[Tensor, list[Tensor]]) -> None:
    """Neither asked, nor believed if their receipts say so."""
    inputs, (exact, fused, _) = honest
    accused = computed(inputs, exact)
    dtypes = {"a": "bfloat16", "b": "int8_bfloat16", "c": "what_is_this", "d": "float32"}
    announced = [
        Announcement(peer_id, "m", accused.revision, BlockSpan(0, 8), dtype, 1.0, 4096, 1)
        for peer_id, dtype in dtypes.items()
    ]
    asked = choose_auditors(announced, accused, Ledger(), (), random.Random(0))
    assert {hop.peer_id for hop in asked} == {"a", "d"}
    given, got = (each.contiguous().numpy().tobytes() for each in (inputs, fused))
    foreign = record_of(SPAN, given, got, len(inputs), dtype="int8_bfloat16")
    same = computed(inputs, exact)
    assert compare_elsewhere(accused, (same, same), 320).finding.verdict is Verdict.PASS
    for three in ((accused, same, foreign), (accused, foreign, same), (foreign, same, same)):
        assert compare_elsewhere(three[0], three[1:], 320).finding.verdict is Verdict.INCONCLUSIVE


def write_anew(folder: Path) -> None:
    """Save every shard of a folder with larger weights, as a training run does."""
    safetensors_torch: Any = safetensors.torch
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor * 1.5 for name, tensor in safetensors_torch.load_file(path).items()}
        safetensors_torch.save_file(tensors, path.with_suffix(".new"), metadata={"format": "pt"})
        path.with_suffix(".new").replace(path)


async def test_weights_that_changed_on_disk_convict_nobody(
    tiny_stories: Path,
    tmp_path: Path,
    honest: tuple[Tensor, list[Tensor]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = shutil.copytree(tiny_stories, tmp_path / "model")
    inputs, (exact, *_) = honest
    source = resolve_model(str(folder), cache_dir=tmp_path)
    room = 2 * source.spec.block_parameters * BYTES_PER_WEIGHT
    verifier = LocalVerifier(source, AuditConfig(memory_bytes=room))
    assert (await verifier.verify(computed(inputs, exact))).verdict is Verdict.PASS
    write_anew(folder)
    # What was loaded before is right, so it still counts.
    assert (await verifier.verify(computed(inputs, exact))).verdict is Verdict.PASS
    assert (await verifier.verify(computed(inputs, exact * 1.5))).verdict is Verdict.FAIL
    assert verifier.can_hold(SPAN)
    # A confirmation loads anew, and so does a look at other blocks.
    for verify in (verifier.confirm, verifier.verify, verifier.verify_fully):
        finding = await verify(identity_over(BlockSpan(4, 6)))
        assert finding.verdict is Verdict.INCONCLUSIVE
        assert "changed after it was hashed" in finding.reason
    assert not verifier.can_hold(SPAN), "others are asked from now on"
    assert caplog.text.count("peers can no longer be audited against this model") == 1
    assert "start p2pinfer again" in caplog.text


async def test_what_fails_on_this_machine_proves_nothing(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object, **__: object) -> Reference:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("p2pinfer.audit.local_verifier.open_reference", run_out)
    finding = await LocalVerifier(source).verify(identity_over(SPAN))
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert "out of memory" in finding.reason


async def test_steps_of_nothing_prove_nothing(source: ModelSource) -> None:
    nothing = identity_over(SPAN, 0)
    for verify in (LocalVerifier(source).verify, LocalVerifier(source).confirm):
        assert (await verify(nothing)).verdict is Verdict.INCONCLUSIVE
    assert compare_elsewhere(nothing, (nothing, nothing), 320).finding.verdict is Verdict.INCONCLUSIVE


async def test_somebody_elses_proof_is_checked_without_the_rest_of_the_model(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[BlockSpan] = []

    def load(checkpoint: Checkpoint, span: BlockSpan, **options: Any) -> Reference:
        loaded.append(span)
        return open_reference(checkpoint, span, **options)

    monkeypatch.setattr("p2pinfer.audit.local_verifier.open_reference", load)
    verifier = LocalVerifier(source)
    assert (await verifier.verify_fully(identity_over(SPAN))).verdict is Verdict.FAIL
    assert loaded == [SPAN]
    assert (await verifier.verify(identity_over(BlockSpan(4, 8)))).verdict is Verdict.FAIL
    assert (await verifier.verify_fully(identity_over(SPAN))).verdict is Verdict.FAIL
    assert loaded == [SPAN, BlockSpan(0, source.spec.num_blocks)]


async def test_what_norms_do_not_settle_is_held_against_the_logits(
    source: ModelSource, honest: tuple[Tensor, list[Tensor]]
) -> None:
    inputs, (exact, *_) = honest
    finding = await LocalVerifier(source).verify_fully(computed(inputs, exact))
    assert finding.verdict is Verdict.PASS
    assert finding.logits_checked


async def test_of_more_positions_than_the_model_has_the_first_are_run(source: ModelSource) -> None:
    long = identity_over(SPAN, source.spec.max_positions + 40)
    assert (await LocalVerifier(source).verify(long)).verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("field", "value"),
    [("rate", 1.5), ("logits_share", -0.1), ("memory_bytes", -1), ("download_bytes", -1), ("timeout_s", 0)],
)
def test_settings_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        AuditConfig(**{field: value})  # type: ignore[arg-type]
