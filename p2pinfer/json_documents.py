"""JSON of a swarm and of a generation's result, for a page, an HTTP server or a script.

`p2pinfer swarm --json` and `p2pinfer generate --json` print these. The key names stay; keys may be added.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec

from p2pinfer.models.span import BlockSpan

from .swarm_view import AllModels, PeerView, SwarmView

if TYPE_CHECKING:  # they import torch, which a look at a swarm does without
    from p2pinfer.audit.auditor import AuditTally
    from p2pinfer.generation.generation import GenerationResult
    from p2pinfer.generation.speculation import SpeculationStats
    from p2pinfer.reputation.ledger import Ledger


class PeerDocument(msgspec.Struct, frozen=True):
    """A peer that announces blocks of a model."""

    peer_id: str
    blocks: tuple[int, int]
    dtype: str
    tokens_per_s: float
    free_cache_tokens: int
    reachability: str
    addrs: tuple[str, ...]
    connection: str | None  # direct, relayed, or None: not connected
    rtt_ms: float | None
    state: str  # answers, refuses or unknown
    name: str = ""  # that its operator gives it; anybody may take any


class SwarmDocument(msgspec.Struct, frozen=True):
    """Peers of one model, and the blocks that lack one."""

    model: str
    revision: str
    num_blocks: int
    missing: tuple[tuple[int, int], ...]
    unknown: tuple[tuple[int, int], ...]
    peers: tuple[PeerDocument, ...]


class AllModelsDocument(SwarmDocument, frozen=True):
    """The usual model as if it had been asked about, and all models that are served."""

    models: tuple[SwarmDocument, ...]


class HopDocument(msgspec.Struct, frozen=True):
    """A hop that a generation used, and its scores in this computer's ledger, 0 to 1."""

    peer_id: str
    blocks: tuple[int, int]
    connection: str
    integrity: float
    reliability: float


class TimingsDocument(msgspec.Struct, frozen=True):
    """Times of a generation; `per_hop_ms` is each hop's median per decoded position."""

    first_token_s: float
    tokens_per_s: float
    per_hop_ms: tuple[float, ...]
    predicted_tokens_per_s: float | None = None  # what was to be expected, before the first token


class SpeculationDocument(msgspec.Struct, frozen=True):
    """Result of speculative decoding; see `p2pinfer.generation.speculation.SpeculationStats`."""

    tokens_per_trip: float
    drafted: int
    accepted: int
    by_depth: tuple[tuple[int, int], ...]  # guesses looked at, and right
    in_flight: float = 1.0  # windows under way when one of them came back, the mean
    predicted_tokens_per_s: float | None = None  # as in the timings


class AuditsDocument(msgspec.Struct, frozen=True):
    """Results of a client's audits so far."""

    done: int
    passed: int
    failed: int
    suspect: int
    inconclusive: int


class ResultDocument(msgspec.Struct, frozen=True):
    """A generation, whole or as far as it came."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str | None  # None: it is not finished
    route: tuple[HopDocument, ...]
    timings: TimingsDocument
    failovers: int
    seed: int | None  # None: it is greedy
    audits: AuditsDocument
    resume_token: str | None = None
    speculation: SpeculationDocument | None = None  # None: it was off
    packed_tokens: int = 0  # of the prompt: their hidden states travelled packed


def swarm_document(view: SwarmView) -> SwarmDocument:
    """Convert the view of one model."""
    return SwarmDocument(
        view.spec.model,
        view.spec.revision,
        view.spec.num_blocks,
        _pairs(view.missing),
        _pairs(view.unknown),
        tuple(_peer(each) for each in view.peers),
    )


def all_models_document(views: AllModels) -> AllModelsDocument:
    """Convert the views of all models of a swarm."""
    usual = swarm_document(views.usual)
    return AllModelsDocument(
        usual.model,
        usual.revision,
        usual.num_blocks,
        usual.missing,
        usual.unknown,
        usual.peers,
        tuple(swarm_document(each) for each in views.served),
    )


def result_document(
    result: GenerationResult, ledger: Ledger, audits: AuditTally, resume_token: str | None = None
) -> ResultDocument:
    """Convert a result.

    Args:
        ledger: Gives the scores of the hops.
        audits: The client's, which go over all of its generations.
        resume_token: The generation's, if it can go on.
    """
    scores = {hop.peer_id: ledger.score(hop.peer_id) for hop in result.route}
    timings = result.timings
    return ResultDocument(
        result.text,
        result.token_ids,
        result.prompt_tokens,
        result.finish_reason,
        tuple(
            HopDocument(
                hop.peer_id,
                (hop.span.start, hop.span.stop),
                hop.connection,
                round(scores[hop.peer_id].integrity, 3),
                round(scores[hop.peer_id].reliability, 3),
            )
            for hop in result.route
        ),
        TimingsDocument(
            timings.first_token_s, timings.tokens_per_s, timings.per_hop_ms, timings.predicted_tokens_per_s
        ),
        result.failovers,
        result.seed,
        AuditsDocument(audits.done, audits.passed, audits.failed, audits.suspect, audits.inconclusive),
        resume_token,
        _speculation(result.speculation, timings.predicted_tokens_per_s),
        result.packed_tokens,
    )


def _speculation(stats: SpeculationStats | None, predicted: float | None) -> SpeculationDocument | None:
    if stats is None:
        return None
    per_trip, in_flight = round(stats.tokens_per_trip, 3), round(stats.in_flight, 3)
    return SpeculationDocument(
        per_trip, stats.drafted, stats.accepted, stats.by_depth, in_flight, predicted_tokens_per_s=predicted
    )


def to_json(document: SwarmDocument | ResultDocument) -> str:
    """Encode a document as one line, in ASCII: the same in every encoding."""
    return json.dumps(msgspec.to_builtins(document))


def _peer(view: PeerView) -> PeerDocument:
    said = view.announcement
    return PeerDocument(
        said.peer_id,
        (said.span.start, said.span.stop),
        said.dtype,
        said.tokens_per_s,
        said.free_cache_tokens,
        said.reachability,
        said.addrs,
        view.connection,
        view.rtt_ms,
        view.state,
        said.name,
    )


def _pairs(spans: list[BlockSpan]) -> tuple[tuple[int, int], ...]:
    return tuple((each.start, each.stop) for each in spans)
