"""Eligibility of candidates as hops, and the message when there are too few."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from itertools import groupby
from typing import Final

from p2pinfer.errors import NoRoute
from p2pinfer.models.numerics import reference_for
from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.view import ReputationView

from .route import Candidate, RouteRequest

_NAMED_DTYPES: Final = 3  # in a message, of what peers may say there


class Ineligibility(IntEnum):
    """Reason why a candidate cannot be a hop, the one that passes soonest first."""

    FULL = 1  # its cache lacks room for the request
    EXCLUDED = 2  # the request says so
    UNTRUSTED = 3  # its integrity is below what the request demands
    BANNED = 4  # the user says so, its audits do, or a proof
    UNCHECKABLE = 5  # its numerics are unknown, or no audit here can run them again
    ENDLESS = 6  # it is at an end of the model, and holds no embedding and head for a client without
    PLAIN = 7  # it takes no packed hidden states, in which the prompt travels
    ABSENT = 8  # it is leaving, or holds another model


def refusal(candidate: Candidate, request: RouteRequest, view: ReputationView | None) -> Ineligibility | None:
    """Reason why `candidate` cannot serve `request`; None if it can."""
    announcement = candidate.announcement
    if announcement.leaving or announcement.revision != request.revision:
        return Ineligibility.ABSENT
    if announcement.span.stop > request.num_blocks:
        return Ineligibility.ABSENT
    is_inner = announcement.span.start > 0 and announcement.span.stop < request.num_blocks
    if request.ends and not (announcement.ends or is_inner):
        return Ineligibility.ENDLESS
    if request.packs and not announcement.packs:
        return Ineligibility.PLAIN
    if reference_for(announcement.numerics) is None:
        return Ineligibility.UNCHECKABLE
    if view is not None and view.is_banned(candidate.peer_id):
        return Ineligibility.BANNED
    if view is not None and not view.score(candidate.peer_id).integrity >= request.min_integrity:
        return Ineligibility.UNTRUSTED
    if candidate.peer_id in request.excluded:
        return Ineligibility.EXCLUDED
    if announcement.free_cache_tokens < request.tokens:
        return Ineligibility.FULL
    return None


def eligible(
    candidates: Iterable[Candidate], request: RouteRequest, view: ReputationView | None
) -> list[Candidate]:
    """The candidates that can serve `request`, in the order of their peer ids, each peer once."""
    usable = {
        candidate.peer_id: candidate for candidate in candidates if refusal(candidate, request, view) is None
    }
    return [usable[peer_id] for peer_id in sorted(usable)]


def no_route(candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView | None) -> NoRoute:
    """The error for a request that the eligible candidates do not cover.

    It tells blocks that nobody serves, which alone are its `missing`, from blocks that are served by peers
    which are full, excluded or banned.
    """
    served = [(candidate.span, refusal(candidate, request, view)) for candidate in candidates]
    wanted = range(request.wanted.start, request.wanted.stop)
    gaps: dict[Ineligibility, list[BlockSpan]] = {}
    for reason, run in groupby(wanted, key=lambda block: _mildest_refusal(block, served)):
        if reason is not None:
            blocks = list(run)
            gaps.setdefault(reason, []).append(BlockSpan(blocks[0], blocks[-1] + 1))
    missing = gaps.get(Ineligibility.ABSENT, [])
    free = (
        each.announcement.free_cache_tokens
        for each, (_, why) in zip(candidates, served, strict=True)
        if why is Ineligibility.FULL
    )
    most = max(free, default=0)
    said = {
        each.announcement.dtype
        for each, (_, why) in zip(candidates, served, strict=True)
        if why is Ineligibility.UNCHECKABLE
    }
    dtypes = sorted(said)[:_NAMED_DTYPES]
    complaints = [
        _complaint(reason, gaps[reason], request, most, dtypes) for reason in sorted(gaps, reverse=True)
    ]
    return NoRoute(
        f"no route: {'; '.join(complaints)}",
        [(span.start, span.stop) for span in missing],
        is_full=set(gaps) == {Ineligibility.FULL},
    )


def _mildest_refusal(
    block: int, served: Iterable[tuple[BlockSpan, Ineligibility | None]]
) -> Ineligibility | None:
    """Reason why nobody can run `block`; None if somebody can."""
    reasons = [reason for span, reason in served if span.start <= block < span.stop]
    if None in reasons:
        return None
    return min((reason for reason in reasons if reason is not None), default=Ineligibility.ABSENT)


def _complaint(
    reason: Ineligibility,
    spans: Sequence[BlockSpan],
    request: RouteRequest,
    most: int,
    dtypes: Sequence[str],
) -> str:
    blocks = f"blocks {', '.join(map(str, spans))}"
    match reason:
        case Ineligibility.FULL:
            return (
                f"{blocks} are served only by peers without cache for {request.tokens} tokens; try again "
                f"soon (the most that any of them has free is {most})"
            )
        case Ineligibility.EXCLUDED:
            return f"{blocks} are served only by peers that failed this request or already work for it"
        case Ineligibility.UNTRUSTED:
            return (
                f"{blocks} are served only by peers whose integrity is below {request.min_integrity:.2f}; "
                "the default policy tries and audits them, `p2pinfer reputation vouch` takes your word for it"
            )
        case Ineligibility.BANNED:
            return f"{blocks} are served only by banned peers; `p2pinfer reputation` says why"
        case Ineligibility.UNCHECKABLE:
            return (
                f"{blocks} are served only by peers that compute in {', '.join(dtypes)}, which this version "
                "of p2pinfer cannot check; update it, or serve them yourself with "
                f"`{request.serve_command} --blocks {spans[0]}`"
            )
        case Ineligibility.ENDLESS:
            return (
                f"{blocks} are served only by peers that do not hold embedding and head for clients without "
                "weights; leave out --thin"
            )
        case Ineligibility.PLAIN:
            return (
                f"{blocks} are served only by peers that take no packed prompt; leave out --prefill-codec, "
                "or have them updated"
            )
        case Ineligibility.ABSENT:
            return f"nobody serves {blocks}; `{request.serve_command} --blocks {spans[0]}` would"
