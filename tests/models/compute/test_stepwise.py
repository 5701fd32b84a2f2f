"""The second way to round: after every operation, as plain implementations do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pinfer.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import Chunk, SpanRunner, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan


def run_in_pieces(runner: SpanRunner, hidden: Tensor) -> Tensor:
    """A prompt, a chunk of it that follows, and two single tokens."""
    lease = runner.cache.reserve(len(hidden))
    outputs: list[Tensor] = []
    for piece in torch.split(hidden, [60, len(hidden) - 62, 1, 1]):
        outputs += runner.run([Chunk(lease, lease.length, piece)])
    lease.release()
    return torch.cat(outputs)


def test_in_float32_both_ways_agree_for_every_family(family_checkpoint: Checkpoint) -> None:
    config = ComputeConfig(device="cpu", dtype="float32", cache_bytes=1 << 22)
    runner = open_runner(family_checkpoint, BlockSpan(0, 4), config)
    hidden = load_embedding_and_head(family_checkpoint, config).embed(
        [3 + (7 * index) % 190 for index in range(90)]
    )
    fused, plain = (run_in_pieces(each, hidden) for each in (runner, runner.stepwise()))
    assert torch.allclose(fused, plain, atol=2e-4, rtol=1e-3)


def test_in_bfloat16_it_rounds_as_transformers_eager_attention_does(
    tiny_stories: Path, oracle: Callable[..., PreTrainedModel]
) -> None:
    checkpoint = open_checkpoint(tiny_stories, "tiny-stories")
    config = ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 22)
    runner = open_runner(checkpoint, BlockSpan(0, 2), config)
    ids = list(range(3, 67))
    model = oracle(tiny_stories, torch.bfloat16)
    with torch.inference_mode():
        expected = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
    hidden = load_embedding_and_head(checkpoint, config).embed(ids)

    def distance(each: SpanRunner) -> float:
        lease = each.cache.reserve(len(ids))
        (output,) = each.run([Chunk(lease, 0, hidden)])
        lease.release()
        return float((output.float() - expected.float()).norm())

    # How near depends on the order in which a processor's kernels add up. Fused kernels are what
    # rounding in other places does on the same processor.
    assert distance(runner.stepwise()) < distance(runner)


def test_both_ways_share_weights_and_cache(family_checkpoint: Checkpoint) -> None:
    config = ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 20)
    runner = open_runner(family_checkpoint, BlockSpan(1, 3), config)
    plain = runner.stepwise()
    assert plain.cache is runner.cache
    assert (plain.span, plain.dtype) == (runner.span, runner.dtype)
