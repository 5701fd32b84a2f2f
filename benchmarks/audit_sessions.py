"""What the audit benchmarks share: sessions of trained models, and how honest peers may run a span."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import smollm2
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import p2pinfer.models
from p2pinfer.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.compute import layers
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import Chunk, SpanRunner, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.sampling import Sampler, SamplingConfig
from p2pinfer.models.text.text import load_tokenizer

MODELS = (BUNDLED_MODEL, "smollm2")
TOKENS = 129  # the first one is judged apart, so four chunks of 32 remain
PROMPT = 33  # tokens that a decoding peer is given at once

_STORIES = """Once upon a time, there was a little fox who
Tom and Mia went to the beach with a red bucket. The sea was
"Where is my hat?" asked Grandpa. Everybody looked under
One rainy day, a small frog sat on a leaf and
The old train was sad because nobody wanted to ride it. Then
Lily had ten buttons. She gave three to Max, and
Deep in the forest lived an owl that was afraid of the dark.
Ben ran home, shut the door, and said,
There was a shy robot in the garden. Every morning it
Mom made a cake for the party, but the cat
A duck and a bear were best friends. They liked to
It was snowing. Sara put on her boots and
The boat had a hole! Water came in, so Sam
Anna found a key under a stone. It was
Leo wanted to fly like a bird. First he
At night the moon told the stars a story about"""
_TEXTS = r"""The harbour was quiet when the ferry came in, and the only person on the quay was a woman with
Le marché ouvre à sept heures. Les premiers clients arrivent avec leurs paniers, et la boulangère
def merge_sorted(left: list[int], right: list[int]) -> list[int]:\n    result = []\n    i = j = 0\n
{"name": "weather-station-7", "location": {"lat": 52.1, "lon": 4.3}, "readings": [{"time": "
<|im_start|>user\nHow do I remove rust from a cast iron pan?<|im_end|>\n<|im_start|>assistant\n
Year, rainfall in mm: 1991 742, 1992 688, 1993 815, 1994 790, 1995 634, 1996 701, 1997
Let f(x) = 3x^2 - 12x + 7. To find the minimum we set the derivative equal to zero:
Photosynthesis takes place in the chloroplasts. Light is absorbed by
SELECT customer_id, SUM(amount) AS total FROM orders WHERE placed_at >=
<|im_start|>user\nWrite a short poem about a lighthouse keeper.<|im_end|>\n<|im_start|>assistant\n
Der Zug nach Leipzig hatte zwanzig Minuten Verspätung, also
The committee met on Tuesday to discuss three questions: the budget, the roof, and
# Installation\n\nFirst make a virtual environment, then install the package:\n\n```bash\n
A neutron star is what remains when
Dear Ms. Okafor,\n\nThank you for your letter of 3 March. I am writing to
Q: What is the capital of Australia?\nA: Canberra.\nQ: How far is it from Sydney?\nA:"""

Outputs = list[Tensor]
Compute = Callable[[SpanRunner, Sequence[Tensor]], Outputs]


def open_model(name: str) -> Checkpoint:
    """A trained model: the bundled one, or SmolLM2-135M from the user's cache."""
    if name == BUNDLED_MODEL:
        return open_checkpoint(Path(p2pinfer.models.__path__[0], BUNDLED_MODEL), name)
    return open_checkpoint(smollm2.smollm2_folder(), name)


def spans_of(name: str) -> list[BlockSpan]:
    """Spans of 1 to 15 blocks, spread over the model."""
    if name == BUNDLED_MODEL:
        bounds = [(0, 1), (2, 3), (5, 6), (7, 8), (0, 2), (4, 6), (0, 4), (4, 8), (1, 7), (0, 8)]
    else:
        bounds = [(0, 1), (7, 8), (14, 15), (20, 21), (29, 30), (0, 2), (12, 14), (0, 4), (12, 16)]
        bounds += [(26, 30), (4, 12), (22, 30), (0, 15), (15, 30)]
    return [BlockSpan(*pair) for pair in bounds]


def sample_sessions(
    checkpoint: Checkpoint, count: int, tokens: int = TOKENS, *, first: int = 0
) -> list[list[int]]:
    """Texts of exactly `tokens` tokens, each an opening and what the model itself makes of it.

    Args:
        first: Which opening, and which seed, to begin with; other ones give texts that are all new.
    """
    tokenizer = load_tokenizer(checkpoint.folder)
    texts = (_STORIES if checkpoint.spec.vocab_size < 10_000 else _TEXTS).splitlines()
    numbers = range(first, first + count)
    openings = [texts[number % len(texts)].replace("\\n", "\n") for number in numbers]
    sessions = [tokenizer.encode(opening)[: tokens // 2] for opening in openings]
    config = ComputeConfig(device="cpu", cache_bytes=1 << 30)
    runner = open_runner(checkpoint, BlockSpan(0, checkpoint.spec.num_blocks), config)
    ends = load_embedding_and_head(checkpoint, config)
    samplers = [Sampler(SamplingConfig(temperature=0.8, seed=seed)) for seed in numbers]
    leases = [runner.cache.reserve(tokens) for _ in sessions]
    while any(len(session) < tokens for session in sessions):
        growing = [index for index, session in enumerate(sessions) if len(session) < tokens]
        chunks = [
            Chunk(leases[index], leases[index].length, ends.embed(sessions[index][leases[index].length :]))
            for index in growing
        ]
        last = torch.stack([output[-1] for output in runner.run(chunks)])
        for index, logits in zip(growing, ends.logits(last), strict=True):
            sessions[index].append(samplers[index].pick(logits, len(sessions[index])))
    return sessions


def embed(checkpoint: Checkpoint, sessions: Sequence[Sequence[int]]) -> Outputs:
    """What enters the first block, by session: (tokens, hidden_size) bfloat16."""
    ends = load_embedding_and_head(checkpoint, ComputeConfig(device="cpu", dtype="bfloat16"))
    return [ends.embed(session) for session in sessions]


def inputs_at(checkpoint: Checkpoint, embedded: Outputs, starts: Sequence[int]) -> dict[int, Outputs]:
    """What enters each block of `starts`, by session: (tokens, hidden_size) bfloat16."""
    config = ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 30)
    runner = open_runner(checkpoint, BlockSpan(0, max(1, *starts)), config)
    hidden, at = embedded, 0
    inputs: dict[int, Outputs] = {}
    for start in sorted(set(starts)):
        if start > at:
            hidden, at = alone(runner, hidden, BlockSpan(at, start)), start
        inputs[start] = hidden
    return inputs


@dataclass(frozen=True, slots=True)
class Mode:
    """A way in which an honest peer may run a span."""

    name: str
    compute: Compute
    dtype: str = "bfloat16"
    device: str = "cpu"
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext  # in force for loading and running


def open_span(
    checkpoint: Checkpoint, span: BlockSpan, dtype: str, device: str, weights: str = "auto"
) -> SpanRunner:
    config = ComputeConfig(device=device, dtype=dtype, weights=weights, cache_bytes=1 << 30)
    return open_runner(checkpoint, span, config)


def alone(runner: SpanRunner, inputs: Sequence[Tensor], span: BlockSpan | None = None) -> Outputs:
    """Each session by itself, in one piece."""
    return [in_pieces(runner, [each], lambda left: left, span)[0] for each in inputs]


def together(runner: SpanRunner, inputs: Sequence[Tensor]) -> Outputs:
    """All sessions in one batch."""
    return in_pieces(runner, inputs, lambda left: left)


def chunked(runner: SpanRunner, inputs: Sequence[Tensor]) -> Outputs:
    """Each session by itself, in pieces of 17 tokens."""
    return [in_pieces(runner, [each], lambda _: 17)[0] for each in inputs]


def decode_alone(runner: SpanRunner, inputs: Sequence[Tensor]) -> Outputs:
    """A prompt, then token by token, each session by itself."""
    return [decode_together(runner, [each])[0] for each in inputs]


def decode_together(runner: SpanRunner, inputs: Sequence[Tensor]) -> Outputs:
    """All sessions step by step at once."""
    return in_pieces(runner, inputs, lambda left: PROMPT if left == len(inputs[0]) else 1)


def mixed(runner: SpanRunner, inputs: Sequence[Tensor]) -> Outputs:
    """A busy node: sessions come and go, prompts and single tokens share batches of ever other sizes."""
    rng = random.Random(0)
    return in_pieces(runner, inputs, lambda _: rng.choice((0, 1, 1, 1, 1, 5, 33)))


def in_pieces(
    runner: SpanRunner,
    inputs: Sequence[Tensor],
    size: Callable[[int], int],
    span: BlockSpan | None = None,
) -> Outputs:
    """Run sessions side by side; `size` says, from how much is left of one, what its next piece is."""
    leases = [runner.cache.reserve(len(each)) for each in inputs]
    outputs: list[list[Tensor]] = [[] for _ in inputs]
    while any(lease.length < len(each) for lease, each in zip(leases, inputs, strict=True)):
        chunks: list[Chunk] = []
        who: list[int] = []
        for index, (lease, each) in enumerate(zip(leases, inputs, strict=True)):
            left = len(each) - lease.length
            if left and (tokens := min(left, size(left))):
                chunks.append(Chunk(lease, lease.length, each[lease.length : lease.length + tokens]))
                who.append(index)
        for index, output in zip(who, runner.run(chunks, span), strict=True):
            outputs[index].append(output.clone())
    for lease in leases:
        lease.release()
    return [torch.cat(each) for each in outputs]


def honest_modes(device: str) -> list[Mode]:
    """The ways there are on this device, those of `stock_modes` not among them."""
    shapes: list[tuple[str, Compute]] = [
        ("prefill", alone),
        ("batched", together),
        ("chunks of 17", chunked),
        ("decode", decode_alone),
        ("decode, batched", decode_together),
        ("mixed batches", mixed),
    ]
    name = device.upper()
    modes = [Mode(f"{name} bfloat16, {shape}", compute, device=device) for shape, compute in shapes]
    modes += [
        Mode(f"{name} bfloat16, unfused attention", alone, device=device, setting=math_attention),
        Mode(f"{name} float32, prefill", alone, "float32", device),
        Mode(f"{name} float32, decode, batched", decode_together, "float32", device),
        Mode(f"{name} float16, prefill", alone, "float16", device),
    ]
    if device == "cpu":
        modes += [
            Mode("CPU bfloat16, weights as they lie", alone, setting=unpacked),
            Mode("CPU bfloat16, weights as they lie, mixed batches", mixed, setting=unpacked),
            Mode("CPU bfloat16, one thread, batched", together, setting=one_thread),
        ]
    else:
        modes += [
            Mode(f"{name} TF32, prefill", alone, "float32", device, tf32),
            Mode(f"{name} TF32, decode, batched", decode_together, "float32", device, tf32),
            Mode(f"{name} float16, decode, batched", decode_together, "float16", device),
            Mode(f"{name} bfloat16, sums in float32", together, device=device, setting=full_sums),
        ]
    return modes


def run_mode(
    mode: Mode, checkpoint: Checkpoint, span: BlockSpan, inputs: Sequence[Tensor], weights: str = "auto"
) -> Outputs:
    """What a peer of this kind gives, (tokens, hidden_size) by session, in its own dtype.

    Args:
        weights: Format in which it holds them.
    """
    with mode.setting():
        return mode.compute(open_span(checkpoint, span, mode.dtype, mode.device, weights), inputs)


class StockBlocks:
    """transformers' own layers, as a peer with other software runs them: one session at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str, attention: str) -> None:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
        self._model: Any = loaded.to(device).eval()
        self._dtype = dtype
        self._device = device

    def run(self, span: BlockSpan, inputs: Sequence[Tensor]) -> Outputs:
        return [self._run(span, each) for each in inputs]

    def _run(self, span: BlockSpan, hidden: Tensor) -> Tensor:
        model = self._model.model
        hidden = hidden.to(self._device, self._dtype)[None]
        positions = torch.arange(hidden.shape[1], device=self._device)[None]
        seen = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool, device=self._device).tril()
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=self._device)
        mask = mask.masked_fill_(~seen, torch.finfo(self._dtype).min)[None, None]
        with torch.inference_mode():
            turned = model.rotary_emb(hidden, positions)
            for layer in model.layers[span.start : span.stop]:
                output = layer(
                    hidden, attention_mask=mask, position_ids=positions, position_embeddings=turned
                )
                hidden = output[0] if isinstance(output, tuple) else output
        return hidden[0].cpu()


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def unpacked() -> Iterator[None]:
    with patch.object(layers, "can_pack", lambda device, dtype: False):
        yield


@contextmanager
def math_attention() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def full_sums() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
