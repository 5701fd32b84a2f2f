"""Passes of training by honest peers of many kinds, judged by verifiers of many kinds; and by liars.

    python benchmarks/honest_training.py                        # this processor, and as two older ones
    python benchmarks/honest_training.py --device cpu cuda --processes 8 --limit-s 180 --out out
    python benchmarks/honest_training.py --isa ALL --sources tiny-stories --lies

A microbatch is some texts of uneven lengths, a span, an adapter, and the gradient that a loss behind the span
has in its output: of all tokens, or of the last ones of each text. Each kind of processor (oneDNN computes as
an older one where ONEDNN_MAX_CPU_ISA says so) and the GPU run it in every mode, there and back; each kind of
processor judges all of them. Nobody may FAIL. Among the texts are a word that repeats itself and random
tokens. With `--lies` peers that lie do the same, and the table says how many of their passes FAIL.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import trio
from audit_sessions import (
    embed,
    full_sums,
    inputs_at,
    math_attention,
    one_thread,
    tf32,
    unpacked,
)
from cheats import WEIGHTS, AlteredCheckpoint
from honest import EXPERTS, open_source, texts_of, write_experts
from safetensors.torch import load_file, save_file
from side_by_side import Done, Job, python, run_all
from torch import Tensor

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.compute.architecture import describe_architecture
from p2pinfer.models.compute.blocks import Blocks
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.learning.adapter import PROJECTIONS, Adapter, AdapterLayout, LowRank, projection_shape
from p2pinfer.models.learning.ends import IGNORED, TrainedEnds, cross_entropy
from p2pinfer.models.learning.rows import Rows
from p2pinfer.models.learning.span_passes import Microbatch, SpanPasses, complete
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.deviation import PassDeviation
from p2pinfer.models.verify.reference import open_reference
from p2pinfer.models.verify.train_passes import TrainedPass, compare_pass, rerun_pass
from p2pinfer.node.evidence.pass_verdict import judge_pass
from p2pinfer.reputation.verdict import Verdict

SPANS = {
    BUNDLED_MODEL: ("0:1", "5:6", "3:5", "0:4", "4:8", "0:8"),
    "smollm2": ("14:15", "0:4", "22:30"),
    "experts": ("0:1", "2:4", "3:6"),
    "deep-experts": ("6:12",),
}
ADAPTERS = ("fresh", "trained", "prompts", "none")
Results = tuple[Tensor, Tensor | None, Tensor | None]  # outputs, gradient of the inputs, of the adapter


@dataclass(frozen=True)
class Mode:
    """A way in which a peer may run passes."""

    dtype: str = "bfloat16"
    is_stepwise: bool = False
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def wire(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


MODES = {
    "cpu": {
        "bfloat16": Mode(),
        "bfloat16 stepwise": Mode(is_stepwise=True),
        "bfloat16 unfused attention": Mode(setting=math_attention),
        "bfloat16 weights as they lie": Mode(setting=unpacked),
        "bfloat16 other threads": Mode(setting=one_thread),
        "float32": Mode("float32"),
        "float16": Mode("float16"),
    },
    "cuda": {
        "bfloat16": Mode(),
        "bfloat16 stepwise": Mode(is_stepwise=True),
        "bfloat16 unfused attention": Mode(setting=math_attention),
        "bfloat16 sums in float32": Mode(setting=full_sums),
        "float32": Mode("float32"),
        "TF32": Mode("float32", setting=tf32),
        "float16": Mode("float16"),
    },
}


@dataclass(frozen=True)
class Task:
    """A microbatch."""

    name: str
    span: BlockSpan
    lengths: tuple[int, ...]
    adapter: str
    hidden: Tensor
    gradient: Tensor

    def batch(self, checkpoint: Checkpoint, device: str = "cpu") -> Microbatch:
        order = torch.cat([torch.arange(length) for length in self.lengths])
        rows = Rows(self.lengths, order, order)
        architecture = describe_architecture(checkpoint.config)
        layout = AdapterLayout()
        if self.adapter in ("fresh", "trained"):
            names = [name for name in PROJECTIONS if _takes(architecture, name)]
            blocks = range(self.span.start, self.span.stop)
            layout = AdapterLayout(tuple(LowRank(block, name, 8, 2.0) for block in blocks for name in names))
        elif self.adapter == "prompts":
            layout = AdapterLayout((), 8)
        size = layout.size(architecture, self.span)
        if not size:
            return Microbatch(self.span, rows.to(torch.device(device)))
        values = torch.randn(size, generator=torch.Generator().manual_seed(len(self.name))) * 0.02
        adapter = Adapter(layout, values, architecture, self.span)
        if self.adapter == "fresh":
            for name, where in adapter.places(self.span):
                if name.startswith("B"):
                    values[where] = 0
        if self.adapter == "prompts":
            values *= 10 * float(self.hidden.float().std())
        target = torch.device(device)
        return Microbatch(self.span, rows.to(target), adapter.to(target))


def _takes(architecture: Any, name: str) -> bool:
    try:
        projection_shape(architecture, name)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------------- microbatches


def make_tasks(source: str, checkpoint: Checkpoint, count: int, first: int) -> list[Task]:
    """Microbatches of every span, each with an adapter of another kind."""
    rng = random.Random(first)
    texts = texts_of(source, checkpoint, 8, first)
    embedded = embed(checkpoint, texts)
    spans = [BlockSpan.parse(text) for text in SPANS[source]]
    config = ComputeConfig(device="cpu", dtype="float32", cache_bytes=1 << 22)
    blocks = open_runner(checkpoint, BlockSpan(0, checkpoint.spec.num_blocks), config).parts[0]
    ends = TrainedEnds(load_embedding_and_head(checkpoint, config))
    inputs = inputs_at(checkpoint, embedded, [span.start for span in spans])
    tasks: list[Task] = []
    for span in spans:
        for number in range(count):
            kind = number % 8
            if kind < 6:
                chosen = [rng.randrange(8) for _ in range(rng.randrange(2, 6))]
            else:  # the odd texts: one word, two words, random ones
                chosen = [8 + (kind - 6) + rng.randrange(2)] * rng.randrange(1, 3)
            lengths = tuple(rng.randrange(16, 129) for _ in chosen)
            hidden = torch.cat(
                [inputs[span.start][text][:length] for text, length in zip(chosen, lengths, strict=True)]
            )
            labels = labels_of([texts[text] for text in chosen], lengths, only_last=bool(number % 3 == 1))
            task = Task(
                f"{source}.{span.start}-{span.stop}.{number}",
                span,
                lengths,
                ADAPTERS[number % 4],
                hidden,
                torch.empty(0),
            )
            gradient = gradient_behind(blocks, ends, checkpoint, task, labels)
            tasks.append(replace(task, gradient=gradient.to(torch.bfloat16)))
    return tasks


def labels_of(texts: Sequence[Sequence[int]], lengths: Sequence[int], *, only_last: bool) -> Tensor:
    """The token that follows each one, or nothing before the last quarter of each text."""
    labels: list[int] = []
    for text, length in zip(texts, lengths, strict=True):
        known = 3 * length // 4 if only_last else 0
        labels += [IGNORED if at < known else text[at + 1] for at in range(length)]
    return torch.tensor(labels)


def gradient_behind(
    blocks: Blocks, ends: TrainedEnds, checkpoint: Checkpoint, task: Task, labels: Tensor
) -> Tensor:
    """Gradient of a mean loss in the span's output."""
    passes, whole = SpanPasses(blocks), checkpoint.spec.num_blocks
    batch = task.batch(checkpoint)
    output = complete(passes.forward(batch, task.hidden)).output
    if task.span.stop == whole:
        _, gradient = ends.loss(output, labels, cross_entropy)
    else:
        rest = Microbatch(BlockSpan(task.span.stop, whole), batch.rows)
        forwarded = complete(passes.forward(rest, output))
        _, gradient = ends.loss(forwarded.output, labels, cross_entropy)
        found = complete(passes.backward(rest, forwarded.inputs, gradient)).hidden
        assert found is not None
        gradient = found
    return gradient / int((labels != IGNORED).sum())


def save_tasks(tasks: Sequence[Task], path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for task in tasks:
        head = f"{task.name}|{task.span}|{task.adapter}"
        tensors |= {
            f"{head}|lengths": torch.tensor(task.lengths),
            f"{head}|hidden": task.hidden.contiguous(),
            f"{head}|gradient": task.gradient.contiguous(),
        }
    save_file(tensors, path)


def load_tasks(path: Path) -> list[Task]:
    tensors = load_file(path)
    heads = dict.fromkeys(name.rpartition("|")[0] for name in tensors)
    tasks: list[Task] = []
    for head in heads:
        name, span, adapter = head.split("|")
        tasks.append(
            Task(
                name,
                BlockSpan.parse(span.replace("-", ":")),
                tuple(tensors[f"{head}|lengths"].tolist()),
                adapter,
                tensors[f"{head}|hidden"],
                tensors[f"{head}|gradient"],
            )
        )
    return sorted(tasks, key=lambda task: task.name)


# ---------------------------------------------------------------------- peers


def run_task(blocks: Blocks, checkpoint: Checkpoint, task: Task, mode: Mode) -> Results:
    """Results of a peer, as they come out of the wire."""
    passes, batch = SpanPasses(blocks), task.batch(checkpoint, str(blocks.device))
    forwarded = complete(passes.forward(batch, task.hidden))
    gradients = complete(passes.backward(batch, forwarded.inputs, task.gradient))
    assert gradients.hidden is not None
    vector = None if gradients.adapter is None else gradients.adapter.cpu()
    return forwarded.output.cpu().to(mode.wire), gradients.hidden.cpu().to(mode.wire), vector


def run_modes(checkpoint: Checkpoint, tasks: Sequence[Task], kind: str) -> dict[str, Tensor]:
    device, found = "cuda" if kind == "cuda" else "cpu", dict[str, Tensor]()
    for name, mode in MODES[device].items():
        with mode.setting():
            config = ComputeConfig(device=device, dtype=mode.dtype, cache_bytes=1 << 22)
            blocks = open_runner(checkpoint, BlockSpan(0, checkpoint.spec.num_blocks), config).parts[0]
            blocks = blocks.stepwise() if mode.is_stepwise else blocks
            for task in tasks:
                _keep(found, f"{name}|{task.name}", run_task(blocks, checkpoint, task, mode))
    return found


def run_lies(checkpoint: Checkpoint, tasks: Sequence[Task]) -> dict[str, Tensor]:
    """Results of peers that lie, in bfloat16."""
    found: dict[str, Tensor] = {}
    mode, config = Mode(), ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 22)
    everything = BlockSpan(0, checkpoint.spec.num_blocks)
    blocks = open_runner(checkpoint, everything, config).parts[0]
    for weights in ("int8 per row", "fp8", "nf4"):
        altered = open_runner(AlteredCheckpoint(checkpoint, WEIGHTS[weights]), everything, config).parts[0]
        for task in tasks:
            _keep(found, f"{weights}|{task.name}", run_task(altered, checkpoint, task, mode))
    former: dict[tuple[BlockSpan, str], Results] = {}
    for task in tasks:
        honest = output, hidden, vector = run_task(blocks, checkpoint, task, mode)
        assert hidden is not None
        for name, factor in (("zeros", 0.0), ("x 0.9", 0.9), ("x 0.97", 0.97), ("sign", -1.0)):
            results = (output, hidden * factor, None if vector is None else vector * factor)
            _keep(found, f"{name}|{task.name}", results)
        last = former.get((task.span, task.adapter))
        if last is not None and last[1] is not None and len(last[1]) >= len(hidden):
            stale = None if last[2] is None or vector is None else last[2]
            _keep(found, f"stale|{task.name}", (output, last[1][: len(hidden)], stale))
        former[task.span, task.adapter] = honest
        if len(task.span) > 1:
            _keep(found, f"skipped block|{task.name}", _skipping(blocks, checkpoint, task, mode))
    return found


def _skipping(blocks: Blocks, checkpoint: Checkpoint, task: Task, mode: Mode) -> Results:
    """Results of a span without its middle block."""
    passes, batch = SpanPasses(blocks), task.batch(checkpoint)
    middle = (task.span.start + task.span.stop) // 2
    bounds = ((task.span.start, middle), (middle + 1, task.span.stop))
    parts = [replace(batch, span=BlockSpan(*pair)) for pair in bounds if pair[0] < pair[1]]
    hidden, kept = task.hidden, []
    for part in parts:
        forwarded = complete(passes.forward(part, hidden))
        hidden = forwarded.output
        kept.append(forwarded.inputs)
    gradient, vector = task.gradient, None
    for part, inputs in zip(reversed(parts), reversed(kept), strict=True):
        found = complete(passes.backward(part, inputs, gradient))
        assert found.hidden is not None
        gradient = found.hidden
        if found.adapter is not None:
            vector = found.adapter if vector is None else vector + found.adapter
    return hidden.to(mode.wire), gradient.to(mode.wire), vector


def _keep(found: dict[str, Tensor], name: str, results: Results) -> None:
    for part, each in zip(("output", "hidden", "vector"), results, strict=True):
        if each is not None:
            found[f"{name}|{part}"] = each.contiguous().clone()


# ---------------------------------------------------------------------- judges


def judge_all(
    source: str, checkpoint: Checkpoint, tasks: Sequence[Task], peers: dict[str, dict[str, Tensor]]
) -> Iterator[dict[str, Any]]:
    """What a verifier says of every pass."""
    reference = open_reference(checkpoint, BlockSpan(0, checkpoint.spec.num_blocks), max_tokens=1)
    for task in tasks:
        batch = task.batch(checkpoint)
        for wire in (torch.bfloat16, torch.float32):
            asked = {
                "forward": TrainedPass(batch, task.hidden),
                "backward": TrainedPass(batch, task.hidden, task.gradient),
            }
            floors = {kind: rerun_pass(reference, each, wire) for kind, each in asked.items()}
            for peer, found in peers.items():
                modes = dict.fromkeys(name.split("|")[0] for name in found)
                for mode in modes:
                    output = found.get(f"{mode}|{task.name}|output")
                    if output is None or output.dtype != wire:
                        continue
                    hidden = found.get(f"{mode}|{task.name}|hidden")
                    vector = found.get(f"{mode}|{task.name}|vector")
                    for kind, given in (("forward", (output, None)), ("backward", (hidden, vector))):
                        yield told_of(f"{peer} {mode}", task, kind, compare_pass(floors[kind], *given))
                    if vector is not None:  # as the first hop of a LoRA: nobody wants its inputs' gradient
                        alone = compare_pass(floors["backward"], None, vector)
                        yield told_of(f"{peer} {mode}", task, "adapter alone", alone)


def told_of(peer: str, task: Task, kind: str, deviation: PassDeviation) -> dict[str, Any]:
    finding = judge_pass(deviation)
    figures = {"roughness": deviation.roughness, "alike": deviation.alike}
    if deviation.tensors:
        rhos = [each.rho for each in deviation.tensors]
        figures |= {"worst tensor": max(rhos), "typical tensor": median(rhos)}
    if deviation.hidden is not None and deviation.hidden.chunks:
        chunks = deviation.hidden.chunks
        figures |= {
            "typical token": max(each.median_rho for each in chunks),
            "tenth": max(each.upper_rho for each in chunks),
            "worst token": max(each.max_rho for each in chunks),
            "in common": max(each.shared for each in chunks),
        }
    if deviation.hidden is not None and deviation.hidden.first_rho is not None:
        figures["first token"] = deviation.hidden.first_rho
    return {
        "peer": peer,
        "task": task.name,
        "adapter": task.adapter,
        "kind": kind,
        "verdict": finding.verdict.value,
        "reason": finding.reason,
        "figures": figures,
    }


# ---------------------------------------------------------------------- the run


def jobs_of(options: argparse.Namespace, folder: Path) -> list[Job]:
    script = Path(__file__)
    words = ("--folder", str(folder), "--batches", str(options.batches), "--first", str(options.first))
    words += ("--isa", *options.isa, "--device", *options.device, *(("--lies",) if options.lies else ()))
    jobs: list[Job] = []
    for source in options.sources:
        about = ("--sources", source, *words)
        jobs.append(Job(f"make {source}", python(script, "--step", "make", *about)))
        runs = [
            Job(
                f"run {source} on {kind}",
                python(script, "--step", "run", "--kind", kind, *about),
                env=environment_of(kind),
                waits_for=(f"make {source}",),
            )
            for kind in kinds_of(options)
        ]
        jobs += runs
        jobs += [
            Job(
                f"judge {source} on {kind}",
                python(script, "--step", "judge", "--kind", kind, *about),
                env=environment_of(kind),
                waits_for=tuple(run.name for run in runs),
            )
            for kind in options.isa
        ]
    return jobs


def kinds_of(options: argparse.Namespace) -> list[str]:
    if options.lies:
        return ["lies"]
    kinds = list(options.isa) if "cpu" in options.device else []
    return [*kinds, *(("cuda",) if "cuda" in options.device else ())]


def environment_of(kind: str) -> dict[str, str]:
    return {**os.environ, **({} if kind in ("cuda", "lies") else {"ONEDNN_MAX_CPU_ISA": kind})}


async def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []

    def take_in(done: Done) -> None:
        print(f"{done.name}: {done.seconds:.0f} s", file=sys.stderr, flush=True)
        if done.name.startswith("judge") and done.said:
            judge = done.name.rpartition(" ")[2]
            told.extend({"judge": judge, **each} for each in json.loads(done.said))
            (options.out / "honest_training.json").write_text(json.dumps(told), encoding="utf-8")

    jobs = jobs_of(options, folder)
    await run_all(jobs, options.processes, take_in, logs=options.out, limit_s=options.limit_s)
    return told


def report(told: Sequence[dict[str, Any]], *, by_peer: bool) -> None:
    """Verdicts, the largest figures, and what failed."""
    verdicts = [verdict.value for verdict in Verdict]
    groups = sorted({each["peer"] if by_peer else each["judge"] for each in told})
    print("| by | direction | passes | " + " | ".join(verdicts) + " |\n|" + "---|" * (3 + len(verdicts)))
    for group in groups:
        for kind in ("forward", "backward", "adapter alone"):
            mine = [
                each
                for each in told
                if each["kind"] == kind and group == (each["peer"] if by_peer else each["judge"])
            ]
            counts = Counter(each["verdict"] for each in mine)
            row = " | ".join(str(counts[verdict]) for verdict in verdicts)
            print(f"| {group} | {kind} | {len(mine)} | {row} |")
    passes = len({(each["task"], each["peer"], each["kind"]) for each in told})
    print(f"{passes} passes of {len({each['task'] for each in told})} microbatches, {len(told)} judgements")
    for kind in ("forward", "backward"):
        largest: dict[str, float] = {}
        for each in told:
            if each["kind"] == kind and each["verdict"] != "inconclusive":
                for name, value in each["figures"].items():
                    largest[name] = max(largest.get(name, 0.0), value)
        print(f"largest, {kind}:", {name: round(value, 3) for name, value in largest.items()})
    if by_peer:
        return
    for each in [each for each in told if each["verdict"] in ("fail", "suspect")][:60]:
        who = " ".join(each[name] for name in ("judge", "peer", "task", "adapter", "kind"))
        print(f"{who}: {each['reason']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--isa", nargs="+", default=["ALL", "AVX512_CORE", "AVX2"])
    parser.add_argument("--sources", nargs="+", choices=tuple(SPANS), default=[BUNDLED_MODEL, "experts"])
    parser.add_argument("--device", nargs="+", choices=("cpu", "cuda"), default=["cpu"])
    parser.add_argument("--batches", type=int, default=16, help="microbatches of each span")
    parser.add_argument("--lies", action="store_true", help="liars instead of honest peers")
    parser.add_argument("--first", type=int, default=40, help="number of the first text; others are new")
    parser.add_argument("--processes", type=int, default=2, help="at once")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="of everything")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(tempfile.gettempdir(), "honest_training"),
        help="folder for what comes",
    )
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=("make", "run", "judge"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is None:
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            report(trio.run(measure, options, Path(temporary)), by_peer=options.lies)
        return
    torch.set_num_threads(1)
    (source,) = options.sources
    folder = options.folder
    if options.step == "make" and source in EXPERTS:
        write_experts(folder / source, *EXPERTS[source], 0)
    checkpoint = open_source(source, folder)
    if options.step == "make":
        save_tasks(make_tasks(source, checkpoint, options.batches, options.first), folder / f"{source}.tasks")
        return
    tasks = load_tasks(folder / f"{source}.tasks")
    if options.step == "run":
        lies = options.kind == "lies"
        found = run_lies(checkpoint, tasks) if lies else run_modes(checkpoint, tasks, options.kind)
        save_file(found, folder / f"{source}.{options.kind}")
    else:
        peers = {kind: load_file(folder / f"{source}.{kind}") for kind in kinds_of(options)}
        print(json.dumps(list(judge_all(source, checkpoint, tasks, peers))))


if __name__ == "__main__":
    main()
