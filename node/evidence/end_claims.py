"""Claims of the hops at a model's ends, in sessions of clients that take token ids in and get tokens out.

The first hop says what the ids were embedded to, by the input of its receipts. The last one says which tokens
follow from the hidden states that it signed for. Both are held against the model's own embedding and head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from p2pinfer.errors import ConfigError
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.text.processors import Processors
from p2pinfer.models.verify.draws import measure_draws, measure_embedded, measure_logs
from p2pinfer.node.protocol.draws import Draw, Log
from p2pinfer.reputation.verdict import Finding, Limit, Verdict

from .hop_record import History

# In units of bfloat16's rounding. Another token's row is hundreds of them away.
EMBEDDED: Final = Limit(4.0, 32.0)
# The same of logits. Honest hops came to 2.7 at most in 21,600 draws, a third of them in bfloat16.
DRAWN: Final = Limit(8.0, 24.0)

# The same of log probabilities, which move with those of all other tokens.
LOGS: Final = Limit(16.0, 48.0)


@dataclass(frozen=True, slots=True)
class EndClaims:
    """Claims of one hop in one session.

    Attributes:
        embedded: Token ids that it was given, by position; empty unless it is the first hop.
        drawn: Tokens that it drew, by the position of the hidden state; empty unless it is the last hop.
        logs: Log probabilities that it gave with them, likewise; empty where none were asked for.
    """

    draw: Draw
    embedded: Mapping[int, int]
    drawn: Mapping[int, int]
    logs: Mapping[int, Log] = field(default_factory=dict[int, Log])


def judge_claims(ends: EmbeddingAndHead, claims: EndClaims, history: History) -> Finding:
    """The verdict on a hop's claims, given the hidden states that it signed for.

    Args:
        ends: In float32.
    """
    return _worst(
        _judge_embedded(ends, claims, history.inputs),
        _judge_drawn(ends, claims, history.outputs, history.positions),
        _judge_logs(ends, claims, history.outputs, history.positions),
    )


def _judge_embedded(ends: EmbeddingAndHead, claims: EndClaims, inputs: Tensor) -> Finding:
    known = [position for position in range(len(inputs)) if position in claims.embedded]
    if not known:
        return Finding(Verdict.INCONCLUSIVE, "it embedded nothing")
    ids = [claims.embedded[position] for position in known]
    worst = measure_embedded(ends, ids, inputs[known].float())
    return Finding(EMBEDDED.judge(worst), f"{len(known)} embedded tokens are {worst:.1f} roundings off")


def _judge_drawn(
    ends: EmbeddingAndHead, claims: EndClaims, outputs: Tensor, positions: Sequence[int]
) -> Finding:
    rows = [row for row, position in enumerate(positions) if position in claims.drawn]
    if not rows:
        return Finding(Verdict.INCONCLUSIVE, "it drew nothing")
    at = [positions[row] for row in rows]
    drawn = [claims.drawn[position] for position in at]
    try:
        process, sampling = _processed(claims.draw), claims.draw.sampling()
    except ConfigError as exc:
        return Finding(Verdict.INCONCLUSIVE, str(exc))
    found = measure_draws(ends, outputs[rows].float(), at, drawn, process, sampling)
    if not found.tokens:
        return Finding(Verdict.INCONCLUSIVE, "draws of typical tokens cannot be told from rounding")
    reason = f"{found.tokens} draws are {found.worst:.1f} roundings off at most, at {found.position}"
    return Finding(DRAWN.judge(found.worst), reason)


def _judge_logs(
    ends: EmbeddingAndHead, claims: EndClaims, outputs: Tensor, positions: Sequence[int]
) -> Finding:
    rows = [row for row, position in enumerate(positions) if position in claims.logs]
    if not rows:
        return Finding(Verdict.INCONCLUSIVE, "it gave no log probabilities")
    at = [positions[row] for row in rows]
    said = [((claims.drawn[each], claims.logs[each].token), *claims.logs[each].likeliest) for each in at]
    worst = measure_logs(ends, outputs[rows].float(), said, claims.draw.logprobs or 0)
    return Finding(LOGS.judge(worst), f"log probabilities of {len(rows)} draws are {worst:.1f} roundings off")


def _processed(draw: Draw) -> Callable[[Tensor, int], Tensor]:
    process = Processors(draw.logits_rules(), range(draw.prompt_tokens), draw.max_ids, draw.eos_ids)
    return lambda logits, length: process(logits, range(length)) if process.applies else logits


def _worst(*findings: Finding) -> Finding:
    order = (Verdict.FAIL, Verdict.SUSPECT, Verdict.PASS, Verdict.INCONCLUSIVE)
    return min(findings, key=lambda finding: order.index(finding.verdict))
