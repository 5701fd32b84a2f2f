from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from p2pinfer.errors import WrongOutput
from p2pinfer.models import verify
from p2pinfer.models.checkpoint import Checkpoint
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.ends import load_ends
from p2pinfer.models.runner import Chunk, open_runner
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text import load_tokenizer
from p2pinfer.models.verify import (
    Reference,
    check_rows,
    measure_span,
    open_reference,
    open_tail,
    run_session,
    run_sessions,
)
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
    return run_session(before, load_ends(checkpoint, config).embed(ids))


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


def test_an_honest_peer_lies_about_one_rounding_away(
    reference: Reference, inputs: Tensor, honest: Tensor
) -> None:
    deviation = measure_span(reference, SPAN, inputs, honest, wire_dtype=BF16)
    assert [(chunk.start, chunk.stop) for chunk in deviation.chunks] == [(1, 33), (33, 65), (65, 97)]
    assert all(0.2 < chunk.median_rho < 1.2 for chunk in deviation.chunks)
    assert deviation.first_rho is not None
    assert deviation.tokens == 96


def test_float32_lies_nearer_than_bfloat16(
    checkpoint: Checkpoint, reference: Reference, inputs: Tensor
) -> None:
    config = ComputeConfig(device="cpu", dtype="float32", cache_bytes=1 << 24)
    outputs = run_session(open_runner(checkpoint, SPAN, config), inputs).to(BF16)
    near = measure_span(reference, SPAN, inputs, outputs, wire_dtype=BF16)
    assert all(chunk.median_rho < 0.8 for chunk in near.chunks)


def test_the_same_tensors_give_the_same_numbers(reference: Reference, inputs: Tensor, honest: Tensor) -> None:
    first, second = (
        measure_span(reference, SPAN, inputs, honest, wire_dtype=torch.float32) for _ in range(2)
    )
    assert first == second


def test_a_long_session_runs_in_pieces_and_comes_to_the_same(
    reference: Reference, inputs: Tensor, honest: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure_span(reference, SPAN, inputs, honest, wire_dtype=BF16)
    monkeypatch.setattr(verify, "_PIECE_TOKENS", 20)
    pieces = measure_span(reference, SPAN, inputs, honest, wire_dtype=BF16)
    for one, other in zip(whole.chunks, pieces.chunks, strict=True):
        assert abs(one.median_rho - other.median_rho) < 0.1


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
    (chunk,) = measure_span(
        reference, span, inputs, outputs[60:], wire_dtype=BF16, positions=at, tail=tail
    ).chunks
    assert (chunk.start, chunk.stop, chunk.tokens) == (60, 97, 37)
    assert chunk.logits is not None
    assert chunk.logits.median_rho < 1.3
    assert chunk.logits.flip_margin < 0.1


def test_an_inner_span_is_judged_by_its_logits_where_the_rest_is_at_hand(
    checkpoint: Checkpoint, reference: Reference, inputs: Tensor, honest: Tensor
) -> None:
    tail = open_tail(checkpoint, SPAN, max_tokens=128)
    fair = measure_span(reference, SPAN, inputs, honest, wire_dtype=BF16, tail=tail)
    for chunk in fair.chunks:
        assert chunk.logits is not None
        assert chunk.logits.median_rho < 1.3
    shifted = honest.clone()
    shifted[50] = honest[80]
    wrong = measure_span(reference, SPAN, inputs, shifted, wire_dtype=BF16, tail=tail).chunks[1].logits
    assert wrong is not None
    assert wrong.max_rho > 20
    assert wrong.flip_margin > 0.1


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
    assert deviation.first_rho < 3


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
    parts = verify._chunks(1, 1 + count)  # pyright: ignore[reportPrivateUsage]
    assert [part.stop - part.start for part in parts] == sizes
    assert parts[0].start == 1
    assert parts[-1].stop == 1 + count


def test_a_text_that_repeats_itself_rounds_alike(checkpoint: Checkpoint, reference: Reference) -> None:
    """An honest peer whose one throw of the dice is another one's is not taken for one that cheats."""
    config = ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 24)
    before = open_runner(checkpoint, BlockSpan(0, SPAN.start), config)
    runner = open_runner(checkpoint, SPAN, config)
    ends = load_ends(checkpoint, config)
    for token_id in (300, 1042, 2222, 3901):
        inputs = run_session(before, ends.embed([token_id] * 65))
        outputs = run_session(runner, inputs)
        deviation = measure_span(reference, SPAN, inputs, outputs, wire_dtype=BF16)
        assert all(chunk.alike > 0.9 for chunk in deviation.chunks)
        assert judge(deviation).verdict is Verdict.INCONCLUSIVE
