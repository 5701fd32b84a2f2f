"""`p2pinfer node` with a lie in it: computes something else than the blocks it announces.

    python benchmarks/lying_node.py int8 node --blocks 3:5 --bootstrap ...
    python benchmarks/lying_node.py skip:0.2 node ...        # lies in a fifth of its sessions
    python benchmarks/lying_node.py skip:1:50 node ...       # is honest in the first 50 of them
    python benchmarks/lying_node.py skip:0.2:0:7 node ...    # lies in another fifth of them: 7 is the seed
    python benchmarks/lying_node.py next node --blocks 5:8   # small_lies.py: next, half-int8, kv-int8
    python benchmarks/lying_node.py redraw node --blocks 5:8 # draws other tokens for clients without weights
    python benchmarks/lying_node.py skip+gap node ...        # and gets around audits; see evasions.py
    python benchmarks/lying_node.py slow node ...            # does not lie; a slower computer
    python benchmarks/lying_node.py grad-zeros:0.5 node ...  # in training; see gradient_cheats.py

Everything after the first word is the command line of `p2pinfer`. Only what the node computes is changed, and
the speed it announces, which is twice what it has: who gains by lying wants to be chosen. Where it lies in
some sessions only, it tells on standard output when it begins to.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import evasions
import gradient_cheats
import torch
from cheats import WEIGHTS, AlteredCheckpoint, skipped, swapped, with_noise
from small_lies import NextLikeliest, PartInt8, keep_cache_in_int8
from torch import Tensor

import p2pinfer.node.node as serving
from p2pinfer.cli.app import main
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.compute.runner import Chunk, SpanRunner, open_runner
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.ends.held_ends import load_held_ends
from p2pinfer.node.serve.decode_speed import DecodeSpeed

BOAST = 2.0
SLOW_STEP_S = 0.004  # by which each step of a slower computer takes longer
Run = Callable[[Sequence[Chunk], BlockSpan | None], list[Tensor]]
Lie = Callable[[Run, Chunk, BlockSpan], Tensor]


def skip_a_block(run: Run, chunk: Chunk, span: BlockSpan) -> Tensor:
    return _in_parts(run, chunk, skipped(span) or [span])


def swap_two_blocks(run: Run, chunk: Chunk, span: BlockSpan) -> Tensor:
    return _in_parts(run, chunk, swapped(span))


def add_noise(run: Run, chunk: Chunk, span: BlockSpan) -> Tensor:
    return with_noise(run([chunk], span)[0], 1e-2, seed=chunk.position).to(chunk.hidden.dtype)


def send_it_back(run: Run, chunk: Chunk, span: BlockSpan) -> Tensor:
    run([chunk], span)
    return chunk.hidden


def tamper(run: Run, chunk: Chunk, span: BlockSpan) -> Tensor:
    """Every 32nd token is that of the span without a block."""
    output = run([chunk], span)[0].clone()
    for row in range(len(output)):
        if (chunk.position + row) % 32 == 5:
            output[row] = chunk.hidden[row]
    return output


OUTPUTS: Mapping[str, Lie] = {
    "skip": skip_a_block,
    "swap": swap_two_blocks,
    "noise": add_noise,
    "identity": send_it_back,
    "tamper": tamper,
}
NAMES: Mapping[str, str] = {
    "int8": "int8 per row",
    "int8g": "int8, groups of 32",
    "fp8": "fp8",
    "nf4": "nf4",
    "pruned": "10 % pruned",
    "tuned": "another revision (rank 8, 1e-2)",
    "weight-noise": "noise of 1 % in the weights",
}


def lie_called(name: str, checkpoint: Checkpoint, span: BlockSpan) -> Lie:
    """The lie of this name, for a node of these blocks."""
    match name:
        case "next":
            return NextLikeliest(checkpoint)
        case "half-int8":
            return PartInt8(checkpoint, span)
        case _:
            return OUTPUTS[name]


class Liar:
    """Decides by session whether to lie, and sticks to it."""

    def __init__(self, lie: Lie, share: float, honest_sessions: int, seed: int) -> None:
        self._lie = lie
        self._share = share
        self._honest_sessions = honest_sessions
        self._rng = random.Random(seed)
        self._lies: dict[int, bool] = {}
        self._kept: list[CacheLease] = []  # so that no two have one id

    def lies_to(self, lease: CacheLease) -> bool:
        """Whether this session is lied to."""
        if any(each is lease for each in evasions.spared):
            return False
        if id(lease) not in self._lies:
            self._kept.append(lease)
            begun = len(self._kept) > self._honest_sessions
            self._lies[id(lease)] = begun and self._rng.random() < self._share
            if self._lies[id(lease)]:
                print(json.dumps({"event": "lies"}), flush=True)
        return self._lies[id(lease)]

    def run(self, honest: Run, chunks: Sequence[Chunk], span: BlockSpan) -> list[Tensor]:
        """What the node gives for a batch."""
        outputs: list[Tensor] = []
        for chunk in chunks:
            if self.lies_to(chunk.lease):
                outputs.append(self._lie(honest, chunk, span))
            else:
                outputs += honest([chunk], span)
        return outputs


def install(cheat: str) -> None:
    """Have nodes of this process cheat: NAME, NAME:SHARE, NAME:SHARE:HONEST_SESSIONS, or that and :SEED."""
    cheat, *tricks = cheat.split("+")
    for trick in tricks:
        evasions.install(trick)
    name, *terms = cheat.split(":")
    share, honest_sessions, seed = [*terms, *("1", "0", "0")[len(terms) :]]
    if name.startswith(gradient_cheats.PREFIX):
        gradient_cheats.install(name, float(share))
        serving.DecodeSpeed = Boastful
        return

    if name == "redraw":
        serving.load_held_ends = partial(held_ends_that_lie, float(share))
        serving.DecodeSpeed = Boastful
        return

    def opened(checkpoint: Checkpoint, span: BlockSpan, *rest: Any, **options: Any) -> SpanRunner:
        if name in NAMES:
            return open_runner(AlteredCheckpoint(checkpoint, WEIGHTS[NAMES[name]]), span, *rest, **options)
        runner = open_runner(checkpoint, span, *rest, **options)
        if name == "slow":
            slow_down(runner)
            return runner
        if name == "kv-int8":
            keep_cache_in_int8(runner)
            return runner
        liar, honest = (
            Liar(lie_called(name, checkpoint, span), float(share), int(honest_sessions), int(seed)),
            runner.run,
        )

        def run(chunks: Sequence[Chunk], part: BlockSpan | None = None) -> list[Tensor]:
            return liar.run(honest, chunks, part or runner.span)

        runner.run = run  # type: ignore[method-assign]
        return runner

    serving.open_runner = opened
    if name != "slow":
        serving.DecodeSpeed = Boastful


class OtherTokens:
    """Embedding and head that give the likeliest token no chance, in some of the draws."""

    def __init__(self, ends: EmbeddingAndHead, share: float) -> None:
        self.embed = ends.embed
        self._ends = ends
        self._share = share
        self._rng = random.Random(0)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self._ends.logits(hidden)
        if self._rng.random() < self._share:
            logits = logits.scatter(-1, logits.argmax(-1, keepdim=True), -torch.inf)
        return logits


def held_ends_that_lie(share: float, *args: Any) -> Any:
    """As `load_held_ends`."""
    ends = load_held_ends(*args)
    return None if ends is None else OtherTokens(ends, share)


def slow_down(runner: SpanRunner) -> None:
    """Have every step take longer, without work."""
    quick = runner.run

    def run(chunks: Sequence[Chunk], part: BlockSpan | None = None) -> list[Tensor]:
        time.sleep(SLOW_STEP_S)
        return quick(chunks, part)

    runner.run = run  # type: ignore[method-assign]


class Boastful(DecodeSpeed):
    """What such a node says of its speed."""

    @property
    def tokens_per_s(self) -> float:
        """See `DecodeSpeed`."""
        return BOAST * super().tokens_per_s


def _in_parts(run: Run, chunk: Chunk, parts: Sequence[BlockSpan]) -> Tensor:
    hidden = chunk.hidden
    for part in parts:
        (hidden,) = run([Chunk(chunk.lease, chunk.position, hidden)], part)
    return hidden


if __name__ == "__main__":
    torch.manual_seed(0)
    install(sys.argv.pop(1))
    main()
