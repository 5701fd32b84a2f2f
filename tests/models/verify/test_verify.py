from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from p2pinfer.errors import WrongOutput
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import Chunk, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.text import load_tokenizer
from p2pinfer.models.verify import sessions, verify
from p2pinfer.models.verify.deviation import ChunkDeviation, Deviation
from p2pinfer.models.verify.reference import Reference, open_reference, open_tail
from p2pinfer.models.verify.sessions import run_session, run_sessions
from p2pinfer.models.verify.verify import check_rows, measure_span, rerun
from p2pinfer.reputation.verdict import Verdict, judge

STORY = (
    "Once upon a time, there was a little fox who lived in a big forest. He had a red ball and he liked to "
    "play with it every day. One day, the ball fell into the river. The fox was sad and he began to cry. A "
    "duck saw him and said, 'Why are you sad, little fox?' The fox said, 'My ball is in the river and I can "
    "not swim.' The duck smiled. She swam to the ball and pushed it with her beak. Soon the ball was on the "
    "grass again. The fox was so happy! He said thank you, and they played together until the sun went down."
)
SPAN = BlockSpan(2, 6)
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def inputs(checkpoint: Checkpoint) -> Tensor:
    """What enters the span, (97, 320), so that three whole chunks can be looked at."""
    ids = load_tokenizer(checkpoint.folder).encode(STORY)[:97]
    assert len(ids) == 97
    config = ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 24)
    before = open_runner(checkpoint, BlockSpan(0, SPAN.start), config)
    return run_session(before, load_embedding_and_head(checkpoint, config).embed(ids))


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Reference:
    return open_reference(checkpoint, BlockSpan(1, 8), max_tokens=128)


@pytest.fixture(scope="module")
def honest(checkpoint: Checkpoint, inputs: Tensor) -> Tensor:
    """A peer that computes in bfloat16, a prompt of 40 tokens and then one by one."""
    config = ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 24)
    runner = open_runner(checkpoint, SPAN, config)
    lease = runner.cache.reserve(len(inputs))
    outputs = runner.run([Chunk(lease, 0, inputs[:40])])
    for position in range(40, len(inputs)):
        outputs += runner.run([Chunk(lease, position, inputs[position : position + 1])])
    return torch.cat(outputs).float()


def by_logits_alone(norms: Deviation, logits: Deviation) -> list[ChunkDeviation]:
    """The chunks of one deviation with the logits of another."""
    pairs = zip(norms.chunks, logits.chunks, strict=True)
    return [replace(one, logits=other.logits) for one, other in pairs]


def verdicts(chunks: Sequence[ChunkDeviation]) -> list[Verdict]:
    """What is said of each by itself."""
    return [judge(Deviation((chunk,))).verdict for chunk in chunks]


def test_an_honest_peer_lies_about_one_rounding_away(
    reference: Reference, inputs: Tensor, honest: Tensor
) -> None:
    deviation = measure_span(reference, SPAN, inputs, honest, wire_dtype=BF16)
    assert [(chunk.start, chunk.stop) for chunk in deviation.chunks] == [(1, 33), (33, 65), (65, 97)]
    assert judge(deviation).verdict is Verdict.PASS
    assert deviation.first_rho is not None
    assert deviation.tokens == 96
    exact = run_session(reference.exact, inputs, SPAN)
    doubled = exact + 2 * (honest - exact)  # the unit is a length: twice the rounding is twice the ratio
    twice = measure_span(reference, SPAN, inputs, doubled, wire_dtype=BF16)
    for one, two in zip(deviation.chunks, twice.chunks, strict=True):
        assert two.median_rho == pytest.approx(2 * one.median_rho, rel=1e-2)


def test_the_runs_that_make_the_unit_lie_one_unit_away(reference: Reference, inputs: Tensor) -> None:
    """On any processor, however it rounds: of their squared ratios the mean is 1, token by token."""
    floor = rerun(reference, SPAN, inputs, BF16)
    assert (floor.distance[1:] > floor.least).sum() > 90
    every = torch.arange(len(inputs))
    squares = torch.stack([floor.deviations(each, every).square().sum(-1) for each in floor.rounded])
    unit = squares.mean(0)[floor.distance > floor.least]
    torch.testing.assert_close(unit, torch.ones_like(unit), atol=1e-4, rtol=0)


def test_float32_lies_nearer_than_bfloat16(
    checkpoint: Checkpoint, reference: Reference, inputs: Tensor, honest: Tensor
) -> None:
    """Of one rounding, that of the wire, than of those of four blocks."""
    config = ComputeConfig(device="cpu", dtype="float32", cache_bytes=1 << 24)
    outputs = run_session(open_runner(checkpoint, SPAN, config), inputs).to(BF16)
    near = measure_span(reference, SPAN, inputs, outputs, wire_dtype=BF16)
    far = measure_span(reference, SPAN, inputs, honest, wire_dtype=BF16)
    assert near.chunks
    for one, other in zip(near.chunks, far.chunks, strict=True):
        assert one.median_rho < other.median_rho


def test_the_same_tensors_give_the_same_numbers(reference: Reference, inputs: Tensor, honest: Tensor) -> None:
    first, second = (
        measure_span(reference, SPAN, inputs, honest, wire_dtype=torch.float32) for _ in range(2)
    )
    assert first == second


def test_a_long_session_runs_in_pieces_and_comes_to_the_same(
    reference: Reference, inputs: Tensor, honest: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_session(reference.exact, inputs, SPAN)
    monkeypatch.setattr(sessions, "PIECE_TOKENS", 20)
    torch.testing.assert_close(run_session(reference.exact, inputs, SPAN), whole, atol=1e-4, rtol=1e-4)
    pieces = measure_span(reference, SPAN, inputs, honest, wire_dtype=BF16)
    assert judge(pieces).verdict is Verdict.PASS


@pytest.mark.parametrize(("room", "batches"), [(64, 4), (192, 4), (256, 1)])
def test_sessions_run_as_one_batch_where_there_is_room_and_come_to_the_same(
    checkpoint: Checkpoint, inputs: Tensor, monkeypatch: pytest.MonkeyPatch, room: int, batches: int
) -> None:
    """Four sessions take a page of 64 tokens each."""
    runner = open_reference(checkpoint, SPAN, max_tokens=room).exact
    sessions = [inputs[:20] * scale for scale in (1.0, 1.1, 0.9, 1.2)]
    expected = [run_session(runner, each) for each in sessions]
    runs: list[int] = []
    run = runner.run

    def counted(chunks: Sequence[Chunk], span: BlockSpan | None = None) -> list[Tensor]:
        runs.append(len(chunks))
        return run(chunks, span)

    monkeypatch.setattr(runner, "run", counted)
    for output, right in zip(run_sessions(runner, sessions), expected, strict=True):
        torch.testing.assert_close(output, right, atol=1e-4, rtol=1e-4)
    assert len(runs) == batches
    assert runner.cache.free_tokens == runner.cache.capacity_tokens


def test_nothing_stays_reserved(reference: Reference, inputs: Tensor, honest: Tensor) -> None:
    free = reference.exact.cache.free_tokens
    with pytest.raises(WrongOutput):
        measure_span(reference, SPAN, inputs, honest[:3], wire_dtype=BF16)
    measure_span(reference, SPAN, inputs, honest, wire_dtype=BF16)
    assert reference.exact.cache.free_tokens == reference.rounded[0].cache.free_tokens == free == 128


def test_a_last_hop_is_judged_by_what_it_was_asked_for(
    checkpoint: Checkpoint, reference: Reference, inputs: Tensor
) -> None:
    span = BlockSpan(2, 8)
    config = ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 24)
    outputs = run_session(open_runner(checkpoint, span, config), inputs)
    at = range(60, 97)
    tail = open_tail(checkpoint, span, max_tokens=128)
    assert tail.runner is None
    deviation = measure_span(reference, span, inputs, outputs[60:], wire_dtype=BF16, positions=at, tail=tail)
    (chunk,) = deviation.chunks
    assert (chunk.start, chunk.stop, chunk.tokens) == (60, 97, 37)
    finding = judge(deviation)
    assert (finding.verdict, finding.logits_checked) == (Verdict.PASS, True)


def test_an_inner_span_is_judged_by_its_logits_where_the_rest_is_at_hand(
    checkpoint: Checkpoint, reference: Reference, inputs: Tensor, honest: Tensor
) -> None:
    tail = open_tail(checkpoint, SPAN, max_tokens=128)
    fair = measure_span(reference, SPAN, inputs, honest, wire_dtype=BF16, tail=tail)
    assert judge(fair).verdict is Verdict.PASS
    assert judge(fair).logits_checked
    shifted = honest.clone()
    shifted[50] = honest[80]
    wrong = measure_span(reference, SPAN, inputs, shifted, wire_dtype=BF16, tail=tail)
    assert verdicts(by_logits_alone(fair, wrong))[:2] == [Verdict.PASS, Verdict.FAIL]
    assert verdicts(by_logits_alone(wrong, fair)) == [Verdict.PASS, Verdict.FAIL, Verdict.PASS]


def test_without_all_outputs_the_blocks_that_follow_cannot_run(
    checkpoint: Checkpoint, reference: Reference, inputs: Tensor, honest: Tensor
) -> None:
    tail = open_tail(checkpoint, SPAN, max_tokens=128)
    deviation = measure_span(
        reference, SPAN, inputs, honest[60:], wire_dtype=BF16, positions=range(60, 97), tail=tail
    )
    assert [chunk.logits for chunk in deviation.chunks] == [None]


def test_no_outputs_are_no_deviation(checkpoint: Checkpoint, reference: Reference, inputs: Tensor) -> None:
    tail = open_tail(checkpoint, BlockSpan(2, 8), max_tokens=128)
    nothing = measure_span(
        reference, SPAN, inputs, torch.empty(0, 320), wire_dtype=BF16, positions=[], tail=tail
    )
    assert nothing.chunks == ()
    assert nothing.first_rho is None


def test_the_first_token_alone_is_no_chunk(reference: Reference, inputs: Tensor, honest: Tensor) -> None:
    deviation = measure_span(reference, SPAN, inputs[:1], honest[:1], wire_dtype=BF16)
    assert deviation.chunks == ()
    assert deviation.first_rho is not None
    assert judge(deviation).verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e9])
def test_outputs_that_cannot_be_reckoned_with_are_refused_before_anything_runs(
    value: float, reference: Reference, inputs: Tensor, honest: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "run_session", None)
    bad = honest.clone()
    bad[3, 5] = value
    with pytest.raises(WrongOutput, match="with a value of"):
        measure_span(reference, SPAN, inputs, bad, wire_dtype=BF16)


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(4, 319), torch.zeros(3, 320), torch.zeros(4 * 320), torch.zeros(4, 320, dtype=torch.int8)],
)
def test_rows_of_another_shape_or_kind_are_refused(rows: Tensor) -> None:
    with pytest.raises(WrongOutput, match=r"where \(4, 320\) is due"):
        check_rows(rows, 4, 320, "a-peer")


def test_a_refusal_names_the_peer() -> None:
    with pytest.raises(WrongOutput) as caught:
        check_rows(torch.zeros(1, 1), 2, 2, "a-peer")
    assert caught.value.peer_id == "a-peer"


@pytest.mark.parametrize("positions", [[3, 2], [1, 1], [-1, 2], [0, 97]])
def test_positions_that_are_not_the_inputs_are_an_error(
    positions: list[int], reference: Reference, inputs: Tensor
) -> None:
    with pytest.raises(ValueError, match="positions"):
        measure_span(reference, SPAN, inputs, inputs[:2], wire_dtype=BF16, positions=positions)


def test_inputs_that_cannot_be_run_are_an_error(reference: Reference, inputs: Tensor) -> None:
    with pytest.raises(ValueError, match="129 tokens"):
        measure_span(reference, SPAN, torch.zeros(129, 320), torch.zeros(129, 320), wire_dtype=BF16)
    with pytest.raises(ValueError, match="the inputs cannot be"):
        measure_span(reference, SPAN, inputs * torch.nan, inputs, wire_dtype=BF16)
    with pytest.raises(ValueError, match="overflow"):
        measure_span(reference, SPAN, inputs * 1e6, inputs, wire_dtype=torch.float16)


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (8, [8]), (31, [31]), (47, [47]), (49, [24, 25]), (96, [32, 32, 32])]
)
def test_chunks_are_even_and_none_is_a_small_rest(count: int, sizes: list[int]) -> None:
    parts = verify.split_chunks(1, 1 + count)
    assert [part.stop - part.start for part in parts] == sizes
    assert parts[0].start == 1
    assert parts[-1].stop == 1 + count


def test_a_text_that_repeats_itself_rounds_alike(
    checkpoint: Checkpoint, reference: Reference, inputs: Tensor, honest: Tensor
) -> None:
    """An honest peer whose one throw of the dice is another one's is not taken for one that cheats."""
    story = measure_span(reference, SPAN, inputs, honest, wire_dtype=BF16)
    usual = max(chunk.alike for chunk in story.chunks)
    config = ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 24)
    before = open_runner(checkpoint, BlockSpan(0, SPAN.start), config)
    runner = open_runner(checkpoint, SPAN, config)
    ends = load_embedding_and_head(checkpoint, config)
    for token_id in (300, 1042, 2222, 3901):
        repeated = run_session(before, ends.embed([token_id] * 65))
        outputs = run_session(runner, repeated)
        deviation = measure_span(reference, SPAN, repeated, outputs, wire_dtype=BF16)
        assert all(chunk.alike > usual for chunk in deviation.chunks)
        assert judge(deviation).verdict is Verdict.INCONCLUSIVE
