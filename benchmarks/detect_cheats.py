"""How much of what dishonest peers do is found, by chunks of 32 tokens.

    python benchmarks/detect_cheats.py
    python benchmarks/detect_cheats.py --model smollm2 --sessions 8
    python benchmarks/detect_cheats.py --packed                   # what travels has 8 bits a value

Every cheat runs in bfloat16 on trained weights, like an honest peer. Each chunk is judged by itself, with
the default limits. For the attack that aims at the logits from inside the tolerance, the blocks after the
span are at hand, as for a client that holds the model; all other cheats are found without them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from audit_sessions import MODELS, Outputs, alone, embed, inputs_at, open_model, open_span, sample_sessions
from cheats import DRIFTS, WEIGHTS, Aim, run_altered, run_parts, skipped, swapped, tampered, with_noise
from small_lies import PartInt8, keep_cache_in_int8
from torch import Tensor

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.packed_rows import rounded_rows
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.deviation import Deviation
from p2pinfer.models.verify.noise_floor import NoiseFloor
from p2pinfer.models.verify.packed_outputs import rounded_where
from p2pinfer.models.verify.reference import Tail, open_reference, open_tail
from p2pinfer.models.verify.verify import compare, rerun
from p2pinfer.reputation.verdict import Verdict, judge

SPANS = {
    BUNDLED_MODEL: ("0:1", "5:6", "4:6", "0:4", "4:8", "0:8"),
    "smollm2": ("0:1", "14:15", "29:30", "12:14", "0:4", "12:16", "4:12", "22:30", "0:15", "15:30"),
}
AIMED_SPANS = {BUNDLED_MODEL: ("0:4", "2:6", "4:8"), "smollm2": ("4:12", "12:16", "22:30")}
AIMED_RATIOS = (0.8, 1.0, 1.15)
INT8_IN_FLOAT32 = "int8, groups of 32, computed in float32"


@dataclass(frozen=True, slots=True)
class Catch:
    """One chunk of a cheat's output."""

    model: str
    span: str
    cheat: str
    found: bool
    suspect: bool
    median: float
    worst: float
    shared: float
    logits: float | None


def judge_chunks(
    model: str,
    span: BlockSpan,
    cheat: str,
    floors: Sequence[NoiseFloor],
    outputs: Outputs,
    tail: Tail | None = None,
) -> Iterator[Catch]:
    """A verdict for each chunk by itself."""
    for floor, output in zip(floors, outputs, strict=True):
        got = output.to(torch.bfloat16).float()
        if floor.packed is not None:
            got = rounded_where(got, floor.packed)
        for chunk in compare(floor, got, range(len(got)), tail).chunks:
            verdict = judge(Deviation((chunk,))).verdict
            yield Catch(
                model,
                str(span),
                cheat,
                verdict is Verdict.FAIL,
                verdict is Verdict.SUSPECT,
                chunk.median_rho,
                chunk.max_rho,
                chunk.shared,
                chunk.logits.median_rho if chunk.logits else None,
            )


def dishonest_outputs(
    checkpoint: Checkpoint, span: BlockSpan, inputs: Outputs
) -> Iterator[tuple[str, Outputs]]:
    """Every cheat's outputs by session."""
    runner = open_span(checkpoint, span, "bfloat16", "cpu")
    honest = alone(runner, inputs)
    for name, alter in {**WEIGHTS, **DRIFTS}.items():
        yield name, run_altered(checkpoint, span, alter, inputs)
    yield INT8_IN_FLOAT32, run_altered(checkpoint, span, WEIGHTS["int8, groups of 32"], inputs, "float32")
    with_int8_cache = open_span(checkpoint, span, "bfloat16", "cpu")
    keep_cache_in_int8(with_int8_cache)
    yield "int8 KV caches", alone(with_int8_cache, inputs)
    part = PartInt8(checkpoint, span, 1 << 30)
    yield (
        "int8 for 15 tokens in 32",
        [part.alone(good, each) for good, each in zip(honest, inputs, strict=True)],
    )
    yield "identity", list(inputs)
    yield "replay", [*honest[1:], honest[0]]
    yield "noise of 1 % in the output", [with_noise(each, 1e-2, seed) for seed, each in enumerate(honest)]
    wrong = list(inputs)
    if len(span) > 1:
        wrong = [run_parts(runner, each, skipped(span)) for each in inputs]
        yield "a block skipped", wrong
        yield "two blocks swapped", [run_parts(runner, each, swapped(span)) for each in inputs]
    yield "one token in 32", [tampered(good, bad) for good, bad in zip(honest, wrong, strict=True)]


def catch_all(model: str, count: int, first: int, *, packed: bool) -> Iterator[Catch]:
    """Every chunk of every cheat on one model."""
    checkpoint = open_model(model)
    spans = [BlockSpan.parse(text) for text in SPANS[model]]
    aimed = [BlockSpan.parse(text) for text in AIMED_SPANS[model]]
    sessions = embed(checkpoint, sample_sessions(checkpoint, count, first=first))
    inputs = inputs_at(checkpoint, sessions, [span.start for span in (*spans, *aimed)])
    if packed:
        inputs = {at: [rounded_rows(each).to(each.dtype) for each in given] for at, given in inputs.items()}
    for span in spans:
        print(f"{model} {span}", file=sys.stderr)
        given = inputs[span.start]
        floors = measure_floors(checkpoint, span, given, packed=packed)
        for cheat, outputs in dishonest_outputs(checkpoint, span, given):
            yield from judge_chunks(model, span, cheat, floors, outputs)
    for span in aimed:
        print(f"{model} {span}, aimed", file=sys.stderr)
        given = inputs[span.start]
        floors = measure_floors(checkpoint, span, given, packed=packed)
        tail = open_tail(checkpoint, span, max_tokens=max(map(len, given)))
        attack = Aim(checkpoint.folder, span)
        for ratio in AIMED_RATIOS:
            pushed = [attack.push(floor, ratio) for floor in floors]
            cheat = f"aimed at the logits, ratio {ratio}"
            yield from judge_chunks(model, span, cheat, floors, pushed, tail)


def measure_floors(
    checkpoint: Checkpoint, span: BlockSpan, inputs: Sequence[Tensor], *, packed: bool = False
) -> list[NoiseFloor]:
    tokens = max(map(len, inputs))
    reference = open_reference(checkpoint, span, max_tokens=tokens)
    rounded = frozenset(range(tokens)) if packed else frozenset[int]()
    return [rerun(reference, span, each, torch.bfloat16, rounded) for each in inputs]


def table(catches: Sequence[Catch]) -> str:
    """What was found of each cheat, and the least of its figures, as Markdown."""
    lines = [
        "| cheat | chunks | found | suspect | chunk | token | shared | logits | missed in |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cheat in dict.fromkeys(catch.cheat for catch in catches):
        chosen = [catch for catch in catches if catch.cheat == cheat]
        found = sum(catch.found for catch in chosen) / len(chosen)
        suspect = sum(catch.suspect for catch in chosen) / len(chosen)
        effects = [catch.logits for catch in chosen if catch.logits is not None]
        missed = sorted({f"{catch.model} {catch.span}" for catch in chosen if not catch.found})
        cells = [
            f"{100 * found:.4g} %",
            f"{100 * suspect:.3g} %",
            f"{min(catch.median for catch in chosen):.3g}",
            f"{min(catch.worst for catch in chosen):.3g}",
            f"{min(catch.shared for catch in chosen):.2g}",
            f"{min(effects):.3g}" if effects else "-",
            ", ".join(missed) or "-",
        ]
        lines.append(f"| {cheat} | {len(chosen)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--sessions", type=int, default=8, help="per span, four chunks each")
    parser.add_argument("--first", type=int, default=0, help="number of the first session; others are new")
    parser.add_argument("--packed", action="store_true", help="what travels is packed, as in long prompts")
    parser.add_argument("--out", type=Path, help="every chunk as a line of JSON")
    options = parser.parse_args()
    catches = [
        catch
        for model in options.model
        for catch in catch_all(model, options.sessions, options.first, packed=options.packed)
    ]
    if options.out:
        options.out.write_text("".join(json.dumps(asdict(catch)) + "\n" for catch in catches))
    print(table(catches))


if __name__ == "__main__":
    main()
