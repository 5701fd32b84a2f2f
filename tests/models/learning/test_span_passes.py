from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from p2pinfer.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.learning.adapter import Adapter, AdapterLayout, LowRank
from p2pinfer.models.learning.span_passes import Gradients, Microbatch, SpanPasses, complete
from p2pinfer.models.span import BlockSpan

from .expected import BLOCKS, Expected, blocks_of
from .expected import expect as expect  # a fixture

CUTS = (((0, 1),), ((1, 3), (3, 4)))  # hops, and the devices of each


def is_close(one: Tensor, other: Tensor, tolerance: float = 2e-5) -> bool:
    """Within so much of the largest value."""
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


def microbatch(passes: SpanPasses, expected: Expected, seed: int = 0) -> Microbatch:
    span = passes.span
    layout = expected.layout(span)
    adapter = Adapter(layout, expected.vector(span), passes.blocks.architecture, span)
    return Microbatch(span, expected.rows, adapter, seed)


@pytest.mark.parametrize("side", ["left", "right"])
def test_outputs_and_gradients_are_those_of_transformers_and_peft(
    family_checkpoint: Checkpoint, expect: Callable[..., Expected], side: str
) -> None:
    """Every family, over uneven spans, one of two devices, of a padded batch longer than the windows."""
    expected = expect(family_checkpoint, [70, 70, 9, 41, 2], side)
    hops = [SpanPasses(*(blocks_of(family_checkpoint, BlockSpan(*part)) for part in parts)) for parts in CUTS]
    batches = [microbatch(hop, expected) for hop in hops]
    hidden = expected.hidden
    kept: list[tuple[Tensor, ...]] = []
    for hop, batch in zip(hops, batches, strict=True):
        forwarded = complete(hop.forward(batch, hidden))
        hidden = forwarded.output
        kept.append(forwarded.inputs)
    assert is_close(hidden, expected.output)
    gradient = expected.of_output
    for hop, batch, inputs in reversed(list(zip(hops, batches, kept, strict=True))):
        gradients = complete(hop.backward(batch, inputs, gradient))
        assert gradients.hidden is not None and gradients.adapter is not None
        gradient = gradients.hidden
        assert is_close(gradients.adapter, expected.vector(batch.span, gradient=True))
    assert is_close(gradient, expected.of_hidden)


def test_a_pass_stops_after_every_block(
    tmp_path: Path, write_checkpoint: Callable[..., Path], expect: Callable[..., Expected]
) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, "llama"), "mine")
    expected = expect(checkpoint, [5], "right")
    hop = SpanPasses(blocks_of(checkpoint, BlockSpan(0, BLOCKS)))
    batch = microbatch(hop, expected)
    assert len(list(hop.forward(batch, expected.hidden))) == BLOCKS
    inputs = complete(hop.forward(batch, expected.hidden)).inputs
    assert len(list(hop.backward(batch, inputs, expected.of_output))) == BLOCKS


def test_blocks_before_the_adapter_are_left_out_where_nobody_wants_the_inputs_gradient(
    tmp_path: Path, write_checkpoint: Callable[..., Path], expect: Callable[..., Expected]
) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, "llama"), "mine")
    expected = expect(checkpoint, [5, 3], "right")
    span = BlockSpan(0, BLOCKS)
    hop = SpanPasses(blocks_of(checkpoint, span))
    layout = AdapterLayout((LowRank(2, "self_attn.q_proj", 3, 0.5),))
    values = torch.randn(layout.size(hop.blocks.architecture, span))
    batch = Microbatch(span, expected.rows, Adapter(layout, values, hop.blocks.architecture, span))
    inputs = complete(hop.forward(batch, expected.hidden)).inputs
    whole = complete(hop.backward(batch, inputs, expected.of_output))
    running = hop.backward(batch, inputs, expected.of_output, wants_hidden=False)
    blocks = 0
    while True:
        try:
            next(running)
            blocks += 1
        except StopIteration as stop:
            part = stop.value
            break
    assert blocks == 2
    assert part.hidden is None
    assert whole.adapter is not None
    assert torch.equal(part.adapter, whole.adapter)


def test_dropout_is_decided_by_its_seed(
    tmp_path: Path, write_checkpoint: Callable[..., Path], expect: Callable[..., Expected]
) -> None:
    """A pass that is repeated drops the same values, in backward too; and it drops as many as asked."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, "llama"), "mine")
    expected = expect(checkpoint, [40], "right")
    span = BlockSpan(0, 1)
    hop = SpanPasses(blocks_of(checkpoint, span))
    layout = AdapterLayout((LowRank(0, "mlp.up_proj", 3, 0.5, dropout=0.25),))
    values = torch.randn(layout.size(hop.blocks.architecture, span))
    adapter = Adapter(layout, values, hop.blocks.architecture, span)

    def output(seed: int) -> Tensor:
        return complete(hop.forward(Microbatch(span, expected.rows, adapter, seed), expected.hidden)).output

    assert torch.equal(output(7), output(7))
    assert not torch.equal(output(7), output(8))
    assert not torch.equal(output(7), output(0))


def test_in_bfloat16_gradients_lie_near_those_of_float32(
    family_checkpoint: Checkpoint, expect: Callable[..., Expected]
) -> None:
    expected = expect(family_checkpoint, [30, 12], "right")
    hop = SpanPasses(blocks_of(family_checkpoint, BlockSpan(0, 2), "bfloat16"))
    exact = SpanPasses(blocks_of(family_checkpoint, BlockSpan(0, 2)))
    found: list[Gradients] = []
    for each in (hop, exact):
        batch = microbatch(each, expected)
        inputs = complete(each.forward(batch, expected.hidden)).inputs
        found.append(complete(each.backward(batch, inputs, expected.of_output)))
    rounded, whole = found
    assert rounded.adapter is not None and whole.adapter is not None
    similarity = torch.cosine_similarity(rounded.adapter, whole.adapter, dim=0)
    assert float(similarity) > (0.9 if family_checkpoint.spec.family == "mixtral" else 0.995)


def test_in_float16_gradients_below_its_range_are_not_lost(
    tmp_path: Path, write_checkpoint: Callable[..., Path], expect: Callable[..., Expected]
) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, "llama"), "mine")
    expected = expect(checkpoint, [30, 12], "right")
    found: list[Gradients] = []
    for dtype in ("float16", "float32"):
        hop = SpanPasses(blocks_of(checkpoint, BlockSpan(0, 2), dtype))
        batch = microbatch(hop, expected)
        inputs = complete(hop.forward(batch, expected.hidden)).inputs
        found.append(complete(hop.backward(batch, inputs, expected.of_output * 1e-7)))
    rounded, whole = found
    assert rounded.adapter is not None and whole.adapter is not None
    assert rounded.hidden is not None and whole.hidden is not None
    assert is_close(rounded.adapter, whole.adapter, 2e-2)
    assert is_close(rounded.hidden, whole.hidden, 2e-2)


def test_gradients_from_graphs_are_those_of_blocks_that_are_run_again(
    tmp_path: Path, write_checkpoint: Callable[..., Path], expect: Callable[..., Expected]
) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, "llama"), "mine")
    expected = expect(checkpoint, [30, 12], "right")
    hop = SpanPasses(blocks_of(checkpoint, BlockSpan(0, BLOCKS)))
    batch = microbatch(hop, expected)
    inputs = complete(hop.forward(batch, expected.hidden)).inputs
    plain = complete(hop.backward(batch, inputs, expected.of_output))
    first = complete(hop.forward(batch, expected.hidden, 1 << 30))
    assert list(first.graphs) == [BLOCKS - 1]  # nothing is known yet of what a graph takes
    one = first.graphs[BLOCKS - 1].size
    assert list(complete(hop.forward(batch, expected.hidden, 2 * one)).graphs) == [BLOCKS - 2, BLOCKS - 1]
    assert not complete(hop.forward(batch, expected.hidden, one // 2)).graphs
    kept = complete(hop.forward(batch, expected.hidden, 1 << 30))
    assert len(kept.graphs) == BLOCKS
    assert torch.equal(kept.output, first.output)
    for _ in range(2):  # with the graphs, and when they are used up
        found = complete(hop.backward(batch, kept.inputs, expected.of_output, graphs=kept.graphs))
        assert found.hidden is not None and plain.hidden is not None
        assert found.adapter is not None and plain.adapter is not None
        assert torch.equal(found.hidden, plain.hidden)
        assert torch.equal(found.adapter, plain.adapter)
        assert not kept.graphs


@pytest.mark.parametrize("tokens", [[30, 12], [100, 90]])
def test_transposed_weights_that_are_kept_change_nothing(
    tmp_path: Path, write_checkpoint: Callable[..., Path], expect: Callable[..., Expected], tokens: list[int]
) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, "llama"), "mine")
    expected = expect(checkpoint, tokens, "right")
    hop = SpanPasses(blocks_of(checkpoint, BlockSpan(0, BLOCKS)))
    batch = microbatch(hop, expected)
    inputs = complete(hop.forward(batch, expected.hidden)).inputs
    for kept_bytes in (0, 1 << 30, 100_000, 0):
        hop.keep_transposed(kept_bytes)
        found = complete(hop.backward(batch, inputs, expected.of_output))
        assert found.hidden is not None
        assert is_close(found.hidden, expected.of_hidden)
