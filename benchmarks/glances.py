"""What a glance sees: how far honest peers and cheats lie, in units of the rounding of what is carried.

    python benchmarks/glances.py --sessions 4
    python benchmarks/glances.py --model smollm2 --tokens 40

A glance runs a span once (`models/verify/glance.py`). It passes what lies within two limits and leaves all
else to a whole audit, so the limits decide two things: how many honest sessions cost both, and which cheats
have to wait for a whole audit. Honest peers are run as in calibrate_audit.py, cheats as in detect_cheats.py.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
from contest import report
from detect_cheats import dishonest_outputs

from p2pinfer.audit.local_verifier import FOLLOWED_TOKENS
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead, load_embedding_and_head
from p2pinfer.models.compute.runner import SpanRunner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.deviation import Glance
from p2pinfer.models.verify.glance import glance_at
from p2pinfer.models.verify.reference import open_reference
from p2pinfer.reputation.verdict import Verdict, judge_glance

FLOAT32 = ComputeConfig(device="cpu", dtype="float32")


@dataclass(frozen=True, slots=True)
class Look:
    """One session of one peer, at a glance."""

    peer: str
    is_honest: bool
    span: str
    seen: Glance


def look_at_all(model: str, sessions: int, tokens: int, spans: Sequence[str]) -> Iterator[Look]:
    """Every session of every peer of one model."""
    checkpoint = open_model(model)
    chosen = [span for span in spans_of(model) if not spans or str(span) in spans]
    embedded = embed(checkpoint, sample_sessions(checkpoint, sessions, tokens))
    inputs = inputs_at(checkpoint, embedded, [span.start for span in chosen])
    stock = {
        f"transformers, {attention}": StockBlocks(checkpoint.folder, torch.bfloat16, "cpu", attention)
        for attention in ("eager", "sdpa")
    }
    for span in chosen:
        print(f"{model} {span}", file=sys.stderr)
        given = inputs[span.start]
        honest = {mode.name: run_mode(mode, checkpoint, span, given) for mode in honest_modes("cpu")}
        honest |= {name: blocks.run(span, given) for name, blocks in stock.items()}
        exact = open_reference(checkpoint, span, max_tokens=tokens).exact
        is_last = span.stop == checkpoint.spec.num_blocks
        ends = load_embedding_and_head(checkpoint, FLOAT32) if is_last else None
        for is_honest, peers in ((True, honest.items()), (False, dishonest_outputs(checkpoint, span, given))):
            for peer, outputs in peers:
                for seen in look(exact, span, given, outputs, ends):
                    yield Look(peer, is_honest, str(span), seen)


def look(
    exact: SpanRunner,
    span: BlockSpan,
    inputs: Outputs,
    outputs: Outputs,
    ends: EmbeddingAndHead | None,
) -> Iterator[Glance]:
    for number, (given, got) in enumerate(zip(inputs, outputs, strict=True)):
        sent = got.to(torch.bfloat16).float()
        followed = random.Random(number).sample(range(len(sent)), min(FOLLOWED_TOKENS, len(sent)))
        yield glance_at(exact, span, given, sent, ends=ends, followed=followed)


def rows_of(looks: Sequence[Look]) -> list[dict[str, object]]:
    """One row for each peer: its largest figures if it is honest, else its smallest, and how many pass."""
    rows: list[dict[str, object]] = []
    for peer in dict.fromkeys(each.peer for each in looks):
        own = [each for each in looks if each.peer == peer]
        bound = max if own[0].is_honest else min
        rows.append(
            {
                "peer": peer,
                "honest": own[0].is_honest,
                "sessions": len(own),
                "typical": round(bound(each.seen.typical for each in own), 2),
                "worst": round(bound(each.seen.worst for each in own), 2),
                "lost": round(bound(each.seen.lost for each in own), 3),
                "pass": f"{sum(_passes(each.seen) for each in own) / len(own):.1%}",
            }
        )
    return rows


def _passes(glance: Glance) -> bool:
    return judge_glance(glance).verdict is Verdict.PASS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default=BUNDLED_MODEL)
    parser.add_argument("--sessions", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=129, help="of a session")
    parser.add_argument("--spans", nargs="*", default=[], help="such as 0:4; all by default")
    options = parser.parse_args()
    looks = [*look_at_all(options.model, options.sessions, options.tokens, options.spans)]
    report(f"{options.model}, sessions of {options.tokens} tokens", rows_of(looks))


if __name__ == "__main__":
    main()
