"""The same on an NVIDIA GPU, where decode steps are recorded as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pinfer.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import Chunk, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.numerics import Numerics
from p2pinfer.models.quantised.formats import FORMATS, quantise
from p2pinfer.models.quantised.products import choose_product
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.reference import open_reference
from p2pinfer.models.verify.sessions import run_session

from ...clear import clear_choices

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")

NEW_TOKENS = 40
DTYPES = (torch.float32, torch.bfloat16)


def generate(checkpoint: Checkpoint, config: ComputeConfig, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations, all sessions stepping together, the last prompt of them in two chunks."""
    runner = open_runner(checkpoint, BlockSpan(0, checkpoint.spec.num_blocks), config)
    ends = load_embedding_and_head(checkpoint, config)
    leases = [runner.cache.reserve(len(prompt) + NEW_TOKENS) for prompt in prompts]
    embedded = [ends.embed(prompt) for prompt in prompts]
    runner.run([Chunk(leases[-1], 0, embedded[-1][:20])])
    chunks = [
        Chunk(lease, lease.length, hidden[lease.length :])
        for lease, hidden in zip(leases, embedded, strict=True)
    ]
    new: list[list[int]] = [[] for _ in prompts]
    for _ in range(NEW_TOKENS):
        last = torch.stack([output[-1] for output in runner.run(chunks)])
        ids = [int(logits.argmax()) for logits in ends.logits(last)]
        for tokens, token in zip(new, ids, strict=True):
            tokens.append(token)
        chunks = [
            Chunk(lease, lease.length, ends.embed([token])) for lease, token in zip(leases, ids, strict=True)
        ]
    return new


def size_of(tensor: Tensor) -> float:
    return tensor.float().square().sum().sqrt().item()


def logits_of(model: Any, ids: list[int]) -> Tensor:
    """transformers' logits on the CPU, (tokens, vocab_size) float32."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids])).logits
    return logits[0].float()


def continuation(model: Any, prompt: list[int]) -> list[int]:
    """What transformers generates on the CPU."""
    batch = torch.tensor([prompt])
    output = model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    return list(output[0, len(prompt) :].tolist())


def test_ids_are_those_of_transformers_for_every_family(
    family_checkpoint: Checkpoint, oracle: Callable[..., PreTrainedModel]
) -> None:
    prompts = [[3 + (5 * index) % 190 for index in range(tokens)] for tokens in (1, 64, 230)]
    config = ComputeConfig(device="cuda", dtype="float32", cache_bytes=1 << 26)
    expected = [continuation(oracle(family_checkpoint.folder), prompt) for prompt in prompts]
    assert generate(family_checkpoint, config, prompts) == expected


def test_bfloat16_ids_are_those_of_transformers_wherever_the_margin_is_clear(
    tiny_stories: Path, oracle: Callable[..., PreTrainedModel]
) -> None:
    checkpoint = open_checkpoint(tiny_stories, "tiny-stories")
    config = ComputeConfig(device="cuda", dtype="bfloat16", cache_bytes=1 << 28)
    prompt = list(range(3, 33))
    ids = prompt + continuation(oracle(tiny_stories), prompt)
    clear = clear_choices(*(logits_of(oracle(tiny_stories, dtype), ids) for dtype in DTYPES))
    runner = open_runner(checkpoint, BlockSpan(0, 8), config)
    ends = load_embedding_and_head(checkpoint, config)
    lease = runner.cache.reserve(len(ids))
    hidden = ends.embed(ids)
    outputs = [runner.run([Chunk(lease, 0, hidden[:10])])[0]]
    outputs += [
        runner.run([Chunk(lease, position, hidden[position : position + 1])])[0]
        for position in range(10, len(ids))
    ]
    picked = ends.logits(torch.cat(outputs)).argmax(-1)
    assert clear.mask.sum() > len(ids) / 4
    assert torch.equal(picked[clear.mask], clear.ids[clear.mask])


@pytest.mark.parametrize("device", ["cuda:0,cuda:0", "cuda:0,cuda:1"])
def test_a_span_over_several_cards_gives_the_ids_of_transformers(
    device: str, family_checkpoint: Checkpoint, oracle: Callable[..., PreTrainedModel]
) -> None:
    """A card named twice is split like two, with a recording and a pool of its own for each part."""
    if device.endswith("1") and torch.cuda.device_count() < 2:
        pytest.skip("one NVIDIA GPU here")
    prompts = [[3 + (5 * index) % 190 for index in range(tokens)] for tokens in (1, 64, 430)]
    config = ComputeConfig(device=device, dtype="float32", cache_bytes=1 << 26)
    expected = [continuation(oracle(family_checkpoint.folder), prompt) for prompt in prompts]
    assert generate(family_checkpoint, config, prompts) == expected


@pytest.mark.parametrize("weights", ["int8", "int4", "nf4"])
def test_quantised_spans_agree_with_their_reference_in_steps_batches_and_prompts(
    tiny_stories: Path, weights: str
) -> None:
    checkpoint, span, tokens = open_checkpoint(tiny_stories, "tiny-stories"), BlockSpan(0, 8), 100
    reference = open_reference(
        checkpoint, span, max_tokens=128, numerics=Numerics(weights, "bfloat16"), device="cpu"
    )
    config = ComputeConfig(device="cuda", weights=weights, cache_bytes=1 << 28)
    runner = open_runner(checkpoint, span, config)
    assert runner.numerics == reference.numerics
    hidden = load_embedding_and_head(checkpoint, ComputeConfig(device="cpu")).embed(list(range(3, 103)))
    exact, rounded = (run_session(each, hidden, span) for each in (reference.exact, reference.rounded[0]))
    unit = size_of((rounded - exact)[1:])
    leases = [runner.cache.reserve(tokens) for _ in range(5)]
    prompt = runner.run([Chunk(leases[0], 0, hidden)])[0]
    alone = [runner.run([Chunk(leases[1], at, hidden[at : at + 1])])[0] for at in range(tokens)]
    together = [
        runner.run([Chunk(lease, at, hidden[at : at + 1]) for lease in leases[2:]])[-1]
        for at in range(tokens)
    ]
    for outputs in (prompt, torch.cat(alone), torch.cat(together)):
        assert size_of((outputs.float() - exact)[1:]) < 1.5 * unit


@pytest.mark.parametrize("weights", ["int8", "int4", "nf4"])
@pytest.mark.parametrize(("outputs", "inputs"), [(256, 512), (100, 320), (48, 14336), (72, 100)])
def test_quantised_products_are_those_of_the_weight_laid_out(weights: str, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    here = quantise(weight, FORMATS[weights])
    packed = quantise(weight.cuda(), FORMATS[weights])
    assert torch.equal(packed.codes.cpu(), here.codes)
    assert torch.equal(packed.scales.cpu(), here.scales)
    product, dense = choose_product(packed, torch.bfloat16), here.dense(torch.float32)
    assert torch.equal(product.dense(torch.bfloat16).cpu(), here.dense(torch.bfloat16))
    for count in (1, 2, 5, 16, 17, 33, 64, 65, 200):
        rows = torch.randn(count, inputs, generator=generator).bfloat16()
        right = rows.float() @ dense.t()
        assert size_of(product(rows.cuda()).cpu().float() - right) < 0.01 * size_of(right)
