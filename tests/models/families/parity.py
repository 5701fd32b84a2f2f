"""Comparison of p2pinfer with transformers, from a config alone.

transformers' model of a config gets random weights and is saved. Then its greedy tokens in float32, made over
its own cache, have to be those of 1 to 4 hops of uneven spans, with prompts in chunks of several sizes, and
several sessions in each batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, logging

from p2pinfer.models.checkpoint.checkpoint import open_checkpoint
from p2pinfer.models.compute import paged_decode
from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import Chunk, SpanRunner, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan

from .samples import BLOCKS, Config

SPLITS = ((0, 4), (0, 1, 4), (0, 2, 3, 4), (0, 1, 2, 3, 4))
PROMPTS = tuple([(37 * index + 11 * seed) % 89 + 3 for index in range(36 + 5 * seed)] for seed in range(3))
CHUNKS = (36, 7, 1)  # of the three prompts
ABSOLUTE, RELATIVE = 5e-4, 1e-4  # what two orders of the same sums may differ by in a logit


@dataclass(frozen=True)
class Expected:
    """What transformers makes of the prompts."""

    logits: list[Tensor]  # of each prompt, (tokens, vocabulary)
    ids: list[list[int]]


def write_model(folder: Path, family: str, config: Config, *, prompts: int = 3, tokens: int = 12) -> Expected:
    """Save a model with random weights and the config as it is here; its logits and greedy tokens."""
    quiet: Any = logging
    quiet.disable_progress_bar()
    quiet.set_verbosity_error()
    auto: Any = AutoModelForCausalLM
    read: Any = AutoConfig.for_model(family, **json.loads(json.dumps(config)))
    # Eager attention of Falcon adds the slopes of ALiBi twice, once with the mask.
    attention = "sdpa" if config.get("alibi") else "eager"
    model: Any = auto.from_config(read, attn_implementation=attention, dtype=torch.float32).eval()
    draw_weights(model)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": family, **config}))
    return run_transformers(model, prompts, tokens)


def draw_weights(model: Any, seed: int = 0) -> None:
    """So large that some logits clearly win."""
    generator = torch.Generator().manual_seed(seed)
    final = {"model.norm.weight", "model.final_layernorm.weight", "transformer.ln_f.weight"}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in final or name.endswith("final_layer_norm.weight"):
                weight.fill_(3.0)
            elif name.endswith(("bias", "sinks")):
                weight.normal_(0, 0.5 if name.endswith("sinks") else 0.1, generator=generator)
            elif "norm" in name or weight.dim() == 1:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
            elif "embed" in name:
                weight.normal_(0, 0.1, generator=generator)
            else:
                inputs = weight.shape[-2 if "GptOss" in type(model).__name__ and weight.dim() == 3 else -1]
                weight.normal_(0, 1.2 / inputs**0.5, generator=generator)


def run_transformers(model: Any, prompts: int, tokens: int) -> Expected:
    """Logits of the first prompts, and the tokens that follow."""
    logits: list[Tensor] = []
    ids: list[list[int]] = []
    with torch.inference_mode():
        for prompt in PROMPTS[:prompts]:
            batch = torch.tensor([prompt])
            logits.append(model(batch).logits[0])
            said = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
            )
            ids.append(said[0, len(prompt) :].tolist())
    return Expected(logits, ids)


class Chain:
    """A model's blocks cut into hops, on this computer."""

    def __init__(self, folder: Path, boundaries: Sequence[int], *, recorded: bool = False) -> None:
        checkpoint = open_checkpoint(folder, "m")
        config = ComputeConfig(device="cpu", dtype="float32", threads=1, cache_bytes=1 << 21, page_tokens=16)
        self.ends = load_embedding_and_head(checkpoint, config)
        self.runners = [open_runner(checkpoint, BlockSpan(*pair), config) for pair in pairwise(boundaries)]
        if recorded:  # as on a GPU, which records steps of one token a session
            self.runners = [
                SpanRunner([stage.recorded() for stage in each.stages], each.cache) for each in self.runners
            ]

    def run(self, steps: Sequence[tuple[list[CacheLease], int, list[int]]]) -> list[Tensor]:
        """Logits of every token of each (leases, position, token ids), all in one batch."""
        states = [self.ends.embed(ids) for _, _, ids in steps]
        for index, runner in enumerate(self.runners):
            chunks = [
                Chunk(leases[index], position, hidden)
                for (leases, position, _), hidden in zip(steps, states, strict=True)
            ]
            states = runner.run(chunks)
        return [self.ends.logits(hidden) for hidden in states]


def run_together(chain: Chain, prompts: Sequence[list[int]], tokens: int) -> Expected:
    """Logits and greedy tokens of these prompts, each round one batch of whatever is next of each."""
    room = max(map(len, prompts)) + tokens
    leases = [[runner.cache.reserve(room) for runner in chain.runners] for _ in prompts]
    waiting = [list(prompt) for prompt in prompts]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    ids: list[list[int]] = [[] for _ in prompts]
    while running := [each for each in range(len(prompts)) if len(ids[each]) < tokens]:
        steps = [(leases[each], leases[each][0].length, waiting[each][: CHUNKS[each]]) for each in running]
        for each, found in zip(running, chain.run(steps), strict=True):
            waiting[each] = waiting[each][CHUNKS[each] :]
            if not ids[each]:
                logits[each].append(found)
            if not waiting[each]:
                waiting[each] = [int(found[-1].argmax())]
                ids[each] += waiting[each]
    return Expected([torch.cat(each) for each in logits], ids)


def compare(folder: Path, expected: Expected, boundaries: Sequence[int], *, recorded: bool = False) -> float:
    """The largest difference of a logit.

    Raises:
        AssertionError: A token is another one, or a logit differs by more than rounding.
    """
    before = paged_decode._MIN_CONTEXT  # pyright: ignore[reportPrivateUsage] -- so that sizes change
    paged_decode._MIN_CONTEXT = 32  # pyright: ignore[reportPrivateUsage]
    try:
        chain = Chain(folder, boundaries, recorded=recorded)
        found = run_together(chain, PROMPTS[: len(expected.ids)], len(expected.ids[0]))
    finally:
        paged_decode._MIN_CONTEXT = before  # pyright: ignore[reportPrivateUsage]
    worst = 0.0
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=ABSOLUTE, rtol=RELATIVE)
        worst = max(worst, float((ours - theirs).abs().max()))
    assert found.ids == expected.ids, f"{found.ids} are not {expected.ids}"
    return worst


def differ(one: Expected, other: Expected) -> bool:
    """True if it shows in the logits, by far more than rounding makes."""
    pairs = zip(one.logits, other.logits, strict=True)
    return any(left.shape != right.shape or float((left - right).abs().max()) > 0.02 for left, right in pairs)


assert max(map(max, SPLITS)) == BLOCKS
