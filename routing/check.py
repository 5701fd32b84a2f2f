"""Validation of a route that a policy returned, before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

from p2pinfer.errors import PolicyError
from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.view import ReputationView

from .eligibility import Ineligibility, refusal
from .route import Candidate, Hop, Route, RouteRequest


def check_routes(
    routes: Sequence[Route], request: RouteRequest, candidates: Sequence[Candidate], view: ReputationView
) -> None:
    """Check that every route covers the blocks wanted, once and in order, with peers that may be used.

    Raises:
        PolicyError: One does not, or there is none; the message says why.
    """
    if not routes:
        raise PolicyError("it returned no route; raise NoRoute if there is none")
    for route in routes:
        _check_shape(route)
        _check_cover(route, request.wanted)
        _check_peers(route, request, candidates, view)


def _check_shape(route: Any) -> None:
    if not isinstance(route, Route):
        raise PolicyError(f"it returned {_brief(route)} instead of a Route")
    # The types promise what follows, but a policy need not have been checked against them.
    hops = cast(Any, route.hops)
    if not (isinstance(hops, tuple) and hops):
        raise PolicyError(
            f"the hops of a route are a tuple of one Hop or more, not {_brief(cast(Any, hops))}"
        )
    for hop in cast(Any, hops):
        if not (
            isinstance(hop, Hop)
            and isinstance(cast(Any, hop.peer_id), str)
            and isinstance(cast(Any, hop.span), BlockSpan)
        ):
            raise PolicyError(f"{_brief(hop)} is not a Hop with a peer id and a BlockSpan")


def _check_cover(route: Route, wanted: BlockSpan) -> None:
    spans = [hop.span for hop in route.hops]
    for before, after in pairwise(spans):
        if before.stop != after.start:
            fault = "a gap" if before.stop < after.start else "an overlap"
            raise PolicyError(f"route {route} has {fault} between {before} and {after}")
    if spans[0].start != wanted.start or spans[-1].stop != wanted.stop:
        raise PolicyError(f"route {route} covers {spans[0].start}:{spans[-1].stop} instead of {wanted}")


def _check_peers(
    route: Route, request: RouteRequest, candidates: Sequence[Candidate], view: ReputationView
) -> None:
    if len(set(route.peer_ids)) < len(route.hops):
        raise PolicyError(f"route {route} uses a peer twice")
    known = {candidate.peer_id: candidate for candidate in candidates}
    for hop in route.hops:
        candidate = known.get(hop.peer_id)
        if candidate is None:
            raise PolicyError(f"route {route} uses {hop.peer_id}, which is not a candidate")
        if not candidate.span.covers(hop.span):
            raise PolicyError(f"route {route} uses {hop.peer_id}, which serves only {candidate.span}")
        reason = refusal(candidate, request, view)
        # A full cache is no nonsense: what was announced may be a minute old, and the peer may say no.
        if reason not in (None, Ineligibility.FULL):
            raise PolicyError(f"route {route} uses {hop.peer_id}, which {_FAULTS[reason]}")


_FAULTS = {
    Ineligibility.EXCLUDED: "the request excludes",
    Ineligibility.UNTRUSTED: "has not shown the integrity that the request demands",
    Ineligibility.BANNED: "is banned",
    Ineligibility.UNCHECKABLE: "computes in a format that cannot be audited here",
    Ineligibility.ABSENT: "is leaving or holds another model",
}


def _brief(thing: object) -> str:
    text = repr(thing)
    return text if len(text) <= 80 else f"{text[:77]}..."
