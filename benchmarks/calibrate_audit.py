"""How far honest peers lie from each other, and the limits that follow for audits.

    python benchmarks/calibrate_audit.py                          # this machine's CPU, both models
    python benchmarks/calibrate_audit.py --device cpu cuda --dump outputs/
    python benchmarks/calibrate_audit.py --dumped outputs/        # those of another machine, judged here
    python benchmarks/calibrate_audit.py --report checks.jsonl    # what was measured, by these limits
    python benchmarks/calibrate_audit.py --weights int4 --span 0:4  # peers that quantise, and say so
    python benchmarks/calibrate_audit.py --weights int4 --says int8  # peers that quantise, and say otherwise
    python benchmarks/calibrate_audit.py --packed                 # what travels has 8 bits a value

Every span of 1 to 15 blocks is run in every mode that an honest peer may use, on trained weights, and held
against a CPU's floor as an audit does. A check is one chunk of 32 tokens in one mode. With no failure among n
checks, the rate of false failures is below 1 - 0.05^(1/n) with a confidence of 95 %, as far as checks are
independent, which those of one session are not quite. Lines of JSON go to `--out`, a table to the terminal.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from audit_sessions import (
    MODELS,
    Outputs,
    StockBlocks,
    embed,
    honest_modes,
    inputs_at,
    open_model,
    run_mode,
    sample_sessions,
    spans_of,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.config import WEIGHTS
from p2pinfer.models.numerics import BFLOAT16, Numerics
from p2pinfer.models.packed_rows import rounded_rows
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.deviation import ChunkDeviation, Deviation, LogitDeviation
from p2pinfer.models.verify.noise_floor import NoiseFloor, measure_floor
from p2pinfer.models.verify.packed_outputs import rounded_where
from p2pinfer.models.verify.reference import Tail, open_reference, open_tail
from p2pinfer.models.verify.verify import compare, rerun
from p2pinfer.reputation.verdict import Verdict, judge

SHORT = (4, 8, 16)
DUMPED_MODES = (
    "bfloat16, prefill",
    "bfloat16, decode, batched",
    "bfloat16, mixed batches",
    "TF32, prefill",
    "float16, prefill",
    "bfloat16, transformers, eager",
    "bfloat16, transformers, sdpa",
)
DUMPED_SPANS = {BUNDLED_MODEL: ("7:8", "0:4", "0:8"), "smollm2": ("7:8", "0:4", "4:12", "0:15", "15:30")}


@dataclass(frozen=True)
class Check:
    """One chunk that was looked at."""

    model: str
    blocks: int
    span: str
    mode: str
    part: str  # "session", or which tokens of it alone
    tokens: int
    median: float
    upper: float
    worst: float
    shared: float
    first: float | None
    logits: float | None
    worst_logits: float | None
    flip_margin: float | None

    @cached_property
    def verdict(self) -> Verdict:
        """By the limits as they are, which may be others than when it was measured."""
        logits = None
        if self.logits is not None and self.worst_logits is not None and self.flip_margin is not None:
            logits = LogitDeviation(self.logits, self.worst_logits, self.flip_margin)
        chunk = ChunkDeviation(
            0, self.tokens, self.tokens, self.median, self.upper, self.worst, self.shared, logits
        )
        return judge(Deviation((chunk,), self.first)).verdict


def checks_of(model: str, span: BlockSpan, mode: str, part: str, deviation: Deviation) -> Iterator[Check]:
    """A deviation's chunks, each by itself."""
    for index, chunk in enumerate(deviation.chunks):
        first = deviation.first_rho if index == 0 else None
        effect = chunk.logits
        yield Check(
            model,
            len(span),
            str(span),
            mode,
            part,
            chunk.tokens,
            chunk.median_rho,
            chunk.upper_rho,
            chunk.max_rho,
            chunk.shared,
            first,
            effect.median_rho if effect else None,
            effect.max_rho if effect else None,
            effect.flip_margin if effect else None,
        )


def check_mode(
    model: str,
    span: BlockSpan,
    mode: str,
    floors: Sequence[NoiseFloor],
    inputs: Outputs,
    outputs: Outputs,
    tail: Tail | None,
) -> Iterator[Check]:
    """Every check of one mode: whole sessions, their ends as a last hop returns them, and shorter ones."""
    for index, (floor, given, output) in enumerate(zip(floors, inputs, outputs, strict=True)):
        got, tokens = output.to(torch.bfloat16).float(), len(output)
        if floor.packed is not None:
            got = rounded_where(got, floor.packed)
        # Logits take longer than all else together: every eighth session will do.
        part = tail if index % 8 == 0 else None
        yield from checks_of(model, span, mode, "session", compare(floor, got, range(tokens), part))
        for count in SHORT:
            last = range(tokens - count, tokens)
            yield from checks_of(model, span, mode, f"last {count}", compare(floor, got[-count:], last))
            short = measure_floor(
                given[:count].float(), floor.exact[:count], [run[:count] for run in floor.rounded]
            )
            short = replace(short, packed=None if floor.packed is None else floor.packed[:count])
            deviation = compare(short, got[:count], range(count))
            yield from checks_of(model, span, mode, f"first {count}", deviation)


def calibrate(
    model: str,
    devices: Sequence[str],
    embedded: Outputs,
    dump: Path | None,
    only: Sequence[str],
    weights: str = "auto",
    says: str = "auto",
    *,
    packed: bool = False,
) -> Iterator[Check]:
    """Every check on one model, of peers that hold `weights` and say `says`."""
    checkpoint = open_model(model)
    spans = [span for span in spans_of(model) if not only or str(span) in only]
    inputs = inputs_at(checkpoint, embedded, [span.start for span in spans])
    modes = [mode for device in devices for mode in honest_modes(device)]
    stock = [
        (
            f"{device.upper()} {str(dtype).removeprefix('torch.')}, transformers, {attention}",
            StockBlocks(checkpoint.folder, dtype, device, attention),
        )
        for device in devices
        if "," not in device and weights == "auto"  # transformers' own layers are run on one, as they are
        for dtype, attention in (
            (torch.bfloat16, "eager"),
            (torch.bfloat16, "sdpa"),
            (torch.float16, "eager"),
        )
        if device != "cpu" or dtype == torch.bfloat16
    ]
    for span in spans:
        given = inputs[span.start]
        if packed:
            given = [rounded_rows(each).to(each.dtype) for each in given]
        outputs = {
            f"{weights} {mode.name}".removeprefix("auto "): run_mode(mode, checkpoint, span, given, weights)
            for mode in modes
        }
        outputs |= {name: blocks.run(span, given) for name, blocks in stock}
        if dump is not None and str(span) in DUMPED_SPANS[model]:
            write_dump(dump, model, span, given, outputs)
        yield from check_span(checkpoint, model, span, given, outputs, devices[-1], says, packed=packed)


def check_span(
    checkpoint: Checkpoint,
    model: str,
    span: BlockSpan,
    inputs: Outputs,
    outputs: dict[str, Outputs],
    tail_device: str,
    says: str = "auto",
    *,
    packed: bool = False,
) -> Iterator[Check]:
    """Every check on one span, against the floor that this machine's CPU measures."""
    tokens = max(map(len, inputs))
    numerics = BFLOAT16 if says == "auto" else Numerics(says, "bfloat16")
    reference = open_reference(checkpoint, span, max_tokens=tokens, numerics=numerics)
    rounded = frozenset(range(tokens)) if packed else frozenset[int]()
    floors = [rerun(reference, span, each, torch.bfloat16, rounded) for each in inputs]
    try:
        tail = open_tail(checkpoint, span, max_tokens=tokens, device=tail_device)
    except CheckpointError:  # of a model that is only here in part
        tail = None
    for mode, each in outputs.items():
        print(f"{model} {span} {mode}", file=sys.stderr)
        yield from check_mode(model, span, mode, floors, inputs, each, tail)


def write_dump(
    folder: Path, model: str, span: BlockSpan, inputs: Outputs, outputs: dict[str, Outputs]
) -> None:
    """What another machine needs to judge these outputs, as one file."""
    kept = {"inputs": torch.stack(list(inputs))}
    kept |= {
        name: torch.stack(each).to(torch.bfloat16)
        for name, each in outputs.items()
        if name.removeprefix("CUDA ") in DUMPED_MODES
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(kept, folder / f"{model}_{span.start}_{span.stop}.safetensors")


def check_dump(path: Path) -> Iterator[Check]:
    """Every check on another machine's outputs."""
    model, start, stop = path.stem.rsplit("_", 2)
    tensors: dict[str, Tensor] = load_file(path)
    inputs = list(tensors.pop("inputs"))
    outputs = {f"{name}, elsewhere": list(each) for name, each in tensors.items()}
    span = BlockSpan(int(start), int(stop))
    yield from check_span(open_model(model), model, span, inputs, outputs, "cpu")


def sessions_of(model: str, options: argparse.Namespace) -> Outputs:
    """Embedded sessions, those of another machine if they are at hand."""
    if options.embedded and (path := options.embedded / f"{model}.embedded").exists():
        return list(load_file(path)["sessions"])
    checkpoint = open_model(model)
    return embed(checkpoint, sample_sessions(checkpoint, options.sessions, first=options.first))


def bound(failures: int, checks: int) -> float:
    """The one-sided 95 % upper bound of a rate (Clopper and Pearson, 1934), by bisection."""
    low, high = failures / checks, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        term = total = (1 - middle) ** checks
        for k in range(1, failures + 1):
            term *= (checks - k + 1) / k * middle / (1 - middle)
            total += term
        low, high = (middle, high) if total > 0.05 else (low, middle)
    return high


def table(checks: Sequence[Check]) -> str:
    """The worst of every mode, as Markdown."""
    columns: list[tuple[str, Callable[[Check], float | None]]] = [
        ("chunk", lambda check: check.median),
        ("tenth", lambda check: check.upper),
        ("token", lambda check: check.worst),
        ("shared", lambda check: check.shared),
        ("first", lambda check: check.first),
        ("logits", lambda check: check.logits),
        ("token's logits", lambda check: check.worst_logits),
        ("lead lost", lambda check: check.flip_margin),
    ]
    lines = [
        "| mode | checks | failed | suspect | " + " | ".join(name for name, _ in columns) + " |",
        "|" + "---|" * (4 + len(columns)),
    ]
    whole = [check for check in checks if check.part == "session"]
    for mode in [*dict.fromkeys(check.mode for check in whole), "all"]:
        chosen = [check for check in whole if mode in (check.mode, "all")]
        worst = [
            max((v for check in chosen if (v := value(check)) is not None), default=None)
            for _, value in columns
        ]
        counts = [sum(check.verdict is each for check in chosen) for each in (Verdict.FAIL, Verdict.SUSPECT)]
        cells = [f"{value:.3g}" if value is not None else "-" for value in worst]
        lines.append(f"| {mode} | {len(chosen)} | {counts[0]} | {counts[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short_table(checks: Sequence[Check]) -> str:
    """The same for few tokens."""
    lines = ["| tokens | checks | failed | suspect | chunk | token |", "|---|---|---|---|---|---|"]
    for part in dict.fromkeys(check.part for check in checks if check.part != "session"):
        chosen = [check for check in checks if check.part == part]
        counts = [sum(check.verdict is each for check in chosen) for each in (Verdict.FAIL, Verdict.SUSPECT)]
        median, worst = max(check.median for check in chosen), max(check.worst for check in chosen)
        lines.append(f"| {part} | {len(chosen)} | {counts[0]} | {counts[1]} | {median:.3g} | {worst:.3g} |")
    return "\n".join(lines)


def report(checks: Sequence[Check]) -> None:
    """The tables and the bound."""
    print(table(checks), "", short_table(checks), "", sep="\n")
    whole = [check for check in checks if check.part == "session"]
    failures = sum(check.verdict is Verdict.FAIL for check in whole)
    print(f"{failures} of {len(whole)} honest checks failed: below {bound(failures, len(whole)):.3%} at 95 %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--device", nargs="+", default=["cpu"], help="cpu, cuda, cuda:0,cuda:1")
    parser.add_argument("--sessions", type=int, default=8, help="per span, four chunks each")
    parser.add_argument("--first", type=int, default=0, help="number of the first session; others are new")
    parser.add_argument("--span", nargs="+", default=[], help="A:B; all of them by default")
    parser.add_argument("--weights", choices=WEIGHTS, default="auto", help="format that the peers hold")
    parser.add_argument("--says", choices=WEIGHTS, help="format that they say; the same by default")
    parser.add_argument("--packed", action="store_true", help="what travels is packed, as in long prompts")
    parser.add_argument("--embed", type=Path, help="only write the sessions here, for another machine")
    parser.add_argument("--embedded", type=Path, help="sessions written so, for who has some blocks only")
    parser.add_argument("--dump", type=Path, help="keep a GPU's outputs here")
    parser.add_argument("--dumped", type=Path, help="judge the outputs kept here, and nothing else")
    parser.add_argument("--out", type=Path, help="every check as a line of JSON; appended to")
    parser.add_argument("--report", type=Path, nargs="+", help="only print the tables of such files")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}", file=sys.stderr)
    if options.report:
        lines = [line for path in options.report for line in path.read_text().splitlines()]
        report([Check(**json.loads(line)) for line in lines])
        return
    if options.embed:
        for model in options.model:
            save_file(
                {"sessions": torch.stack(sessions_of(model, options))}, options.embed / f"{model}.embedded"
            )
        return
    if options.dumped:
        sources = [check_dump(path) for path in sorted(options.dumped.glob("*.safetensors"))]
    else:
        sources = [
            calibrate(
                model,
                options.device,
                sessions_of(model, options),
                options.dump,
                options.span,
                options.weights,
                options.says or options.weights,
                packed=options.packed,
            )
            for model in options.model
        ]
    checks: list[Check] = []
    for source in sources:
        for check in source:
            checks.append(check)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(asdict(check)) + "\n")
    report(checks)


if __name__ == "__main__":
    main()
