"""Honest peers of many kinds, judged by verifiers of many kinds: nobody may FAIL.

    python benchmarks/honest.py                              # this processor, and as two older ones
    python benchmarks/honest.py --isa ALL AVX2 --sources tiny-stories experts
    python benchmarks/honest.py --isa ALL --device cpu cuda  # peers on a GPU beside
    python benchmarks/honest.py --processes 16 --limit-s 500 --out honest

What comes is written to `--out` at once: honest.json, all that was found so far, and a log of each process.

A processor computes as an older one would where ONEDNN_MAX_CPU_ISA says so. Each kind runs every span in
every mode: own kernels, and transformers' eager and SDPA; in bfloat16, float16 and float32; prompts, steps,
batches. Then each kind judges what all of them gave. It does so as a client that holds the blocks, of all
tokens and of the last ones alone, at a glance, and as one that does not, with two and with three opinions of
others. A check is one chunk of about 32 tokens, judged by itself; a client judges a whole session, and these
verdicts are counted beside. A glance is one check. It runs the session up to a position that is drawn, as
audits do, and what it does not pass is measured, as a whole session. Among the texts are a word that repeats
itself and random tokens; `experts` and `deep-experts` are mixtures with random weights and routers that are
as decisive as trained ones. `--seed` gives other weights.

With no failure among n checks the rate is below 1 - 0.05^(1/n) with a confidence of 95 %, as far as checks
are independent, which those of one session are not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import trio
from audit_sessions import (
    Outputs,
    StockBlocks,
    embed,
    honest_modes,
    inputs_at,
    open_model,
    run_mode,
    sample_sessions,
)
from calibrate_audit import bound
from safetensors.torch import load_file, save_file
from side_by_side import Done, Job, python, run_all
from torch import Tensor

from p2pinfer.audit.local_verifier import FOLLOWED_TOKENS, draw_beginning
from p2pinfer.audit.opinions import judge_by_opinions
from p2pinfer.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead, load_embedding_and_head
from p2pinfer.models.compute.runner import SpanRunner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.deviation import Deviation, Glance
from p2pinfer.models.verify.glance import glance_at
from p2pinfer.models.verify.reference import Tail, open_reference
from p2pinfer.models.verify.verify import compare, rerun
from p2pinfer.node.evidence.hop_record import History
from p2pinfer.reputation.small_lies import Sample, SmallLies, sample_of
from p2pinfer.reputation.verdict import Finding, Thresholds, Verdict, judge, judge_glance, judged_figures

EXPERTS = {"experts": (6, 256), "deep-experts": (12, 128)}  # blocks, hidden size
SOURCES = (BUNDLED_MODEL, "smollm2", *EXPERTS)
SPANS = {
    BUNDLED_MODEL: ("0:1", "5:6", "3:5", "0:4", "4:8", "0:8"),
    "smollm2": ("14:15", "0:4", "22:30"),
    "experts": ("0:1", "2:4", "0:3", "3:6"),
    "deep-experts": ("0:12", "6:12", "9:12"),
}
TOKENS = 129
LAST = 37  # tokens that a last hop is asked for
OPINIONS_PER_SESSION = 24
GLANCES = 2  # of all tokens, and of the last ones


def write_experts(folder: Path, blocks: int, hidden_size: int, seed: int) -> None:
    """A Mixtral of random weights with routers that mostly have a clear favourite."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=2000,
        max_position_embeddings=2048,
    )
    torch.manual_seed(seed)
    model: Any = MixtralForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate.weight" in name:
                weight.mul_(8)
            elif weight.dim() >= 2 and "embed" not in name:
                weight.mul_(2)
        model.model.embed_tokens.weight.mul_(20)
    model.to(torch.bfloat16).save_pretrained(folder)


@cache
def open_source(source: str, folder: Path) -> Checkpoint:
    """The model of a source; `folder` is where the mixture was written."""
    return open_checkpoint(folder / source, source) if source in EXPERTS else open_model(source)


def texts_of(source: str, checkpoint: Checkpoint, count: int, first: int) -> list[list[int]]:
    """Usual texts, if the model is trained, and odd ones."""
    rng, words = random.Random(first), checkpoint.spec.vocab_size
    usual = [[rng.randrange(words) for _ in range(TOKENS)] for _ in range(count)]
    if source not in EXPERTS:
        usual = sample_sessions(checkpoint, count, TOKENS, first=first)
    one, other = rng.randrange(words), rng.randrange(words)
    odd = [
        [one] * TOKENS,
        [one, other] * (TOKENS // 2) + [one],
        [rng.randrange(words) for _ in range(TOKENS)],
    ]
    return [*usual, *odd]


def write_inputs(source: str, folder: Path, count: int, first: int) -> None:
    """What enters every span, the same for all kinds of processors."""
    checkpoint = open_source(source, folder)
    sessions = embed(checkpoint, texts_of(source, checkpoint, count, first))
    spans = [BlockSpan.parse(text) for text in SPANS[source]]
    inputs = inputs_at(checkpoint, sessions, [span.start for span in spans])
    for span in spans:
        save_file({"inputs": torch.stack(inputs[span.start])}, folder / f"in_{name_of(source, span)}")


def write_outputs(source: str, folder: Path, kind: str, span: BlockSpan) -> None:
    """What every mode gives on this kind of processor, or on the GPU, as it would travel in bfloat16."""
    checkpoint, device = open_source(source, folder), "cuda" if kind == "cuda" else "cpu"
    inputs = list(load_file(folder / f"in_{name_of(source, span)}")["inputs"])
    outputs: dict[str, Outputs] = {
        mode.name: run_mode(mode, checkpoint, span, inputs) for mode in honest_modes(device)
    }
    for attention in ("eager", "sdpa"):
        stock = StockBlocks(checkpoint.folder, torch.bfloat16, device, attention)
        outputs[f"{device} bfloat16 {attention}"] = stock.run(span, inputs)
    kept = {name: torch.stack(each).to(torch.bfloat16) for name, each in outputs.items()}
    save_file(kept, folder / f"out_{kind}_{name_of(source, span)}")


class Count:
    """What a verifier found."""

    def __init__(self) -> None:
        self.verdicts: Counter[str] = Counter()
        self.sessions: Counter[str] = Counter()  # verdicts on whole sessions, as a client has them
        self.worst: dict[str, float] = {}  # largest part of what FAILs, by figure
        self.means: dict[str, list[float]] = {}  # by peer and span, x of the two tests of small lies
        self.failures: list[str] = []

    def add(self, client: str, who: str, deviation: Deviation) -> None:
        for chunk in deviation.chunks:
            alone = Deviation((chunk,), deviation.first_rho if chunk is deviation.chunks[0] else None)
            finding = judge(alone)
            self.verdicts[f"{client} {finding.verdict.value}"] += 1
            if finding.verdict is Verdict.FAIL:
                self.failures.append(f"{client}: {who}: {finding.reason}")
            for what, value, limit in judged_figures(alone, Thresholds()):
                part = (value - 1) / (limit.fails - 1) if limit.fails > 1 else value / limit.fails
                name = what.split(" tokens ")[0]
                self.worst[name] = max(self.worst.get(name, 0.0), part)

    def add_glance(self, who: str, finding: Finding, whole: Deviation) -> None:
        """Count a glance; `whole` is what an audit looks at where that does not settle it."""
        if finding.verdict is not Verdict.PASS:
            finding = judge(whole)
            self.sessions[f"measured after a glance: {finding.verdict.value}"] += 1
        self.verdicts[f"glances {finding.verdict.value}"] += 1
        if finding.verdict is Verdict.FAIL:
            self.failures.append(f"glance: {who}: {finding.reason}")

    def add_all(self, told: dict[str, Any]) -> None:
        """Take in what another process found."""
        self.verdicts.update(told["verdicts"])
        self.sessions.update(told["sessions"])
        self.failures += told["failures"]
        for who, each in told["means"].items():
            self.means.setdefault(who, []).extend(each)
        for what, part in told["worst"].items():
            self.worst[what] = max(part, self.worst.get(what, 0.0))

    def add_sample(self, who: str, sample: Sample) -> None:
        """One session of a peer: what the tests of small lies make of it."""
        for test, bets in (
            ("high", SmallLies().after(sample).high),
            ("lost", SmallLies().after(sample).lost),
        ):
            if bets.rounds:
                # wealth = stake (1 + bet (x - mean)), with a stake of a half
                self.means.setdefault(f"{test} {who}", []).append((bets.wealth * 2 - 1) / 10 + 0.05)


def judge_span(source: str, folder: Path, kinds: Sequence[str], span: BlockSpan, kind: str) -> Count:
    """Judge the outputs of all kinds of peers with this kind of processor."""
    checkpoint, count, rng = open_source(source, folder), Count(), random.Random(f"{kind} {source} {span}")
    head = load_embedding_and_head(checkpoint, ComputeConfig(device="cpu", dtype="float32"))
    inputs = load_file(folder / f"in_{name_of(source, span)}")["inputs"].float()
    peers = {
        f"{kind}, {mode}": outputs.float()
        for kind in kinds
        for mode, outputs in load_file(folder / f"out_{kind}_{name_of(source, span)}").items()
    }
    reference = open_reference(checkpoint, span, max_tokens=TOKENS)
    is_last = span.stop == checkpoint.spec.num_blocks
    tail = Tail(None, head) if is_last else None
    for number, given in enumerate(inputs):
        print(f"judging {source} {span}, text {number}", file=sys.stderr)
        # Every attempt at other experts is a run: a third of the peers, in turn, will do.
        looked_at = peers if source not in EXPERTS else dict(islice(peers.items(), number % 3, None, 3))
        floor = rerun(reference, span, given, torch.bfloat16)
        for name, outputs in looked_at.items():
            who = f"{source} {span} text {number} {name}"
            whole = compare(floor, outputs[number], range(TOKENS), tail)
            count.add("all tokens", who, whole)
            count.sessions[f"text {number}: {judge(whole).verdict.value}"] += 1
            count.add_sample(f"{source} {span} {name}", sample_of(whole))
            last = range(TOKENS - LAST, TOKENS)
            count.add("last tokens", who, compare(floor, outputs[number][-LAST:], last, tail))
            for where in (range(TOKENS), last):
                history = History(given, outputs[number][list(where)], tuple(where))
                for _ in range(GLANCES):
                    seen = glance(reference.exact, span, draw_beginning(history, rng), head, rng)
                    count.add_glance(who, judge_glance(seen), whole)
        ask_others(count, rng, span, given, {name: each[number] for name, each in peers.items()})
    return count


def glance(
    exact: SpanRunner, span: BlockSpan, part: History, head: EmbeddingAndHead, rng: random.Random
) -> Glance:
    """A glance as an audit takes it (`LocalVerifier.glance`)."""
    tokens = len(part.positions)
    return glance_at(
        exact,
        span,
        part.inputs,
        part.outputs,
        part.positions,
        ends=head if span.stop == exact.spec.num_blocks else None,
        followed=rng.sample(range(tokens), min(FOLLOWED_TOKENS, tokens)),
    )


def ask_others(
    count: Count, rng: random.Random, span: BlockSpan, given: Tensor, peers: dict[str, Tensor]
) -> None:
    """Judge some peers by the outputs of two and of three others, which may be of its own kind."""
    names = sorted(peers)
    for _ in range(OPINIONS_PER_SESSION):
        audited, *others = (rng.choice(names) for _ in range(4))
        histories = [History(given, peers[each], tuple(range(TOKENS))) for each in (audited, *others)]
        for many in (2, 3):
            finding = judge_by_opinions(histories[0], histories[1 : 1 + many], len(span)).finding
            count.verdicts[f"{many} opinions {finding.verdict.value}"] += TOKENS // 32
            if finding.verdict is not Verdict.PASS:
                count.failures.append(
                    f"{many} opinions: {span} {audited} by {others[:many]}: {finding.reason}"
                )


def name_of(source: str, span: BlockSpan) -> str:
    return f"{source}_{span.start}_{span.stop}.safetensors"


def jobs_of(options: argparse.Namespace, folder: Path) -> list[Job]:
    """The processes of a run: inputs, then what each kind of peer gives, then each kind's judgement."""
    script = Path(__file__)
    words = ("--folder", str(folder), "--sessions", str(options.sessions), "--first", str(options.first))
    words += ("--seed", str(options.seed), "--isa", *options.isa, "--device", *options.device)
    inputs = [
        Job(f"inputs {source}", python(script, "--step", "inputs", "--sources", source, *words))
        for source in options.sources
    ]
    jobs = inputs
    for source in options.sources:
        for span in SPANS[source]:
            about = ("--sources", source, "--span", span, *words)
            runs = [
                Job(
                    f"run {source} {span} on {kind}",
                    python(script, "--step", "run", "--kind", kind, *about),
                    env=environment_of(kind),
                    waits_for=(f"inputs {source}",),
                )
                for kind in kinds_of(options)
            ]
            judgements = [
                Job(
                    f"judge {source} {span} on {kind}",
                    python(script, "--step", "judge", "--kind", kind, *about),
                    env=environment_of(kind),
                    waits_for=tuple(run.name for run in runs),
                )
                for kind in options.isa
            ]
            jobs += [*runs, *judgements]
    return jobs


def kinds_of(options: argparse.Namespace) -> list[str]:
    """Kinds of peers: processors, and the GPU, which is one whatever the processor beside it."""
    return [
        *(options.isa if "cpu" in options.device else ()),
        *(("cuda",) if "cuda" in options.device else ()),
    ]


def environment_of(kind: str) -> dict[str, str]:
    """Environment of a process whose processor computes as `kind` does."""
    return {**os.environ, **({} if kind == "cuda" else {"ONEDNN_MAX_CPU_ISA": kind})}


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """What each kind of verifier found in all that it came to, by kind."""
    judges: dict[str, Count] = {kind: Count() for kind in options.isa}

    def take_in(done: Done) -> None:
        print(f"{done.name}: {done.seconds:.0f} s", file=sys.stderr)
        if not done.name.startswith("judge") or not done.said:
            return
        judges[done.name.rpartition(" ")[2]].add_all(json.loads(done.said))
        told = {kind: vars(count) for kind, count in judges.items()}
        (options.out / "honest.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
        print(summary_of(told), file=sys.stderr, flush=True)

    await run_all(
        jobs_of(options, folder), options.processes, take_in, logs=options.out, limit_s=options.limit_s
    )
    return {kind: vars(count) for kind, count in judges.items()}


def summary_of(judges: dict[str, dict[str, Any]]) -> str:
    """Checks that failed, and the bound that follows."""
    total: Counter[str] = Counter()
    for told in judges.values():
        total.update(told["verdicts"])
    checks = sum(total.values())
    failed = sum(count for name, count in total.items() if name.endswith(" fail"))
    if not checks:
        return "no check came to an end"
    return f"{failed} of {checks} checks failed: below {bound(failed, checks):.4%} at 95 %, one-sided"


def report(judges: dict[str, dict[str, Any]]) -> None:
    """The table, the worst figures and the bound."""
    verdicts = ("pass", "suspect", "inconclusive", "fail")
    clients = ("all tokens", "last tokens", "glances", "2 opinions", "3 opinions")
    print("| client | checks | " + " | ".join(verdicts) + " |\n|" + "---|" * 6)
    total: Counter[str] = Counter()
    for told in judges.values():
        total.update(told["verdicts"])
    for client in clients:
        counts = [total[f"{client} {verdict}"] for verdict in verdicts]
        print(f"| {client} | {sum(counts)} | " + " | ".join(map(str, counts)) + " |")
    print(summary_of(judges))
    sessions: Counter[str] = Counter()
    for told in judges.values():
        sessions.update(told["sessions"])
    print("whole sessions, all tokens:", dict(sorted(sessions.items())))
    worst: dict[str, float] = {}
    means: dict[str, float] = {}
    for told in judges.values():
        for what, part in told["worst"].items():
            worst[what] = max(worst.get(what, 0.0), part)
        for who, each in told["means"].items():
            means[who] = max(means.get(who, 0.0), sum(each) / len(each))
    print("largest part of the room up to FAIL:", {what: round(part, 2) for what, part in worst.items()})
    print(
        "largest mean of x:", sorted(((round(each, 3), who) for who, each in means.items()), reverse=True)[:5]
    )
    for kind, told in judges.items():
        for line in told["failures"][:40]:
            print(f"judged by {kind}: {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--isa", nargs="+", default=["ALL", "AVX512_CORE", "AVX2"])
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--device", nargs="+", choices=("cpu", "cuda"), default=["cpu"])
    parser.add_argument("--sessions", type=int, default=2, help="usual texts beside the three odd ones")
    parser.add_argument("--seed", type=int, default=0, help="of the mixtures' weights")
    parser.add_argument("--first", type=int, default=40, help="number of the first text; others are new")
    parser.add_argument("--processes", type=int, default=2, help="at once")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="of everything")
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir(), "honest"), help="folder for what comes"
    )
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--span", help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=("inputs", "run", "judge"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    match options.step:
        case "inputs":
            (source,) = options.sources
            if source in EXPERTS:
                write_experts(options.folder / source, *EXPERTS[source], options.seed)
            write_inputs(source, options.folder, options.sessions, options.first)
        case "run":
            write_outputs(options.sources[0], options.folder, options.kind, BlockSpan.parse(options.span))
        case "judge":
            span = BlockSpan.parse(options.span)
            found = judge_span(options.sources[0], options.folder, kinds_of(options), span, options.kind)
            print(json.dumps(vars(found)))
        case _:
            options.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as temporary:
                report(trio.run(measure, options, Path(temporary)))


if __name__ == "__main__":
    main()
