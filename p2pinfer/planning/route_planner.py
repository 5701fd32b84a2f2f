"""Route planner of a client: candidates, the policy's choice, and the outcomes it learns from."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import trio

from p2pinfer.errors import NoRoute, PeerError, PeerRefused
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.configs.numbers import differences
from p2pinfer.models.numerics import LOSSLESS, Codec, common_codec, row_bytes
from p2pinfer.models.span import BlockSpan, uncovered
from p2pinfer.node.swarm.membership import SwarmMember
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.routing.config import RoutingConfig
from p2pinfer.routing.cost import edges_are_known, route_cost
from p2pinfer.routing.eligibility import eligible
from p2pinfer.routing.route import Candidate, Edge, Hop, Route, RouteOutcome, RouteRequest
from p2pinfer.served import describe_served, served_models
from p2pinfer.session.failover import Gap
from p2pinfer.session.terms import KeptSession

from .cooldowns import Cooldowns
from .hop_timings import HopTimings
from .policy_runner import PolicyRunner
from .quarrels import Quarrels

LEAST_TOKENS: Final = 64  # who has room for fewer has none
_WORTH_CHANGING: Final = 0.5  # of what a slow hop takes: who saves less is not fed a session's past for it
_MOST_FOR_PREFIX: Final = 1.25  # times as long a token may take over hops that keep a prefix


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """Route and codec of a session that is to be opened, both from the same announcements.

    Attributes:
        codec: What travels: what all hops of the route compute in, or float32, which loses nothing.
        packs: All hops take packed hidden states as well.
    """

    route: Route
    codec: Codec
    packs: bool = False


class RoutePlanner:
    """Routes for one model; a session's `Replanner`.

    Args:
        member: Its table says who there is.
        ledger: Told how hops fared, as are the policy at `policy_runner`, and the sessions to come.
        busy_pause_s: How long a peer that refused for want of room is left alone.
        routing_config: What two routes are compared by.
        joining: The options by which this swarm is joined, as words of a command line, for what is advised.
        model: The model as it was asked for.
        is_thin: True if the first hop has to embed, and the last one to draw.
        packs: True if hops are preferred that take packed prompts.
    """

    def __init__(
        self,
        member: SwarmMember,
        spec: ModelSpec,
        ledger: Ledger,
        policy_runner: PolicyRunner,
        busy_pause_s: float,
        routing_config: RoutingConfig | None = None,
        *,
        joining: Sequence[str] = (),
        model: str = "",
        is_thin: bool = False,
        packs: bool = False,
    ) -> None:
        self._member = member
        self._spec = spec
        self._ledger = ledger
        self._policy_runner = policy_runner
        self._routing_config = routing_config
        self._joining = tuple(joining)
        self._is_thin = is_thin
        self._packs = packs
        named = ("--model", model) if model not in ("", BUNDLED_MODEL) else ()
        self._serve_command = shlex.join(("p2pinfer", "node", *named, *self._joining))
        self._cooldowns = Cooldowns(busy_pause_s)
        self._hop_timings = HopTimings()
        self._quarrels = Quarrels()

    async def plan_session(self, tokens: int, excluded: frozenset[str]) -> SessionPlan:
        """The policy's first choice for all blocks, of peers that may have room, and what travels over it.

        The choice depends on what an edge costs, that on what travels, and what travels on the choice. Where
        the peers in question share a codec it is known beforehand. Else the choice is made at the size of
        float32 first; if its hops share a smaller codec, it is made again among peers that have that one,
        at its size. So the route that is taken was chosen at the size that it sends.

        Raises:
            NoRoute: There is none. Without those that had no room a moment ago, that means: later.
        """
        excluded |= self._cooldowns.peers(trio.current_time())
        candidates = self._candidates(excluded, None)
        if self._packs:
            with suppress(NoRoute):
                packing = [each for each in candidates if each.announcement.packs]
                return await self._plan_among(packing, tokens, excluded)
        return await self._plan_among(candidates, tokens, excluded)

    async def _plan_among(
        self, candidates: Sequence[Candidate], tokens: int, excluded: frozenset[str]
    ) -> SessionPlan:
        """As `plan_session` does, of these candidates."""
        request = self._request(tokens, excluded, candidates, LOSSLESS)
        likely = _codec_of(eligible(candidates, request, self._ledger))
        route = await self._choose(candidates, self._request(tokens, excluded, candidates, likely))
        codec = _codec_of(each for each in candidates if each.peer_id in route.peer_ids)
        if codec not in (likely, LOSSLESS):
            alike = [each for each in candidates if _codec_of([each]) == codec]
            with suppress(NoRoute):  # somebody's policy may change its mind
                route = await self._choose(alike, self._request(tokens, excluded, alike, codec))
        packs = all(each.announcement.packs for each in candidates if each.peer_id in route.peer_ids)
        return SessionPlan(route, codec, packs)

    async def plan_again(
        self, kept: KeptSession, tokens: int, excluded: frozenset[str]
    ) -> SessionPlan | None:
        """The route of a session whose hops keep its cache; None if the policy would not take it any more.

        It may be a little slower than the one that would be chosen otherwise.
        """
        excluded |= self._cooldowns.peers(trio.current_time())
        candidates = self._candidates(excluded, None)
        keeping = [each for each in candidates if each.peer_id in kept.route.peer_ids]
        if _codec_of(keeping) != kept.codec or len(keeping) < len(kept.route.hops):
            return None
        request = self._request(tokens, excluded, candidates, kept.codec)
        try:
            again = await self._choose(keeping, self._request(tokens, excluded, keeping, kept.codec))
            best = await self._choose(candidates, request)
        except NoRoute:
            return None
        cost, least = (
            route_cost(each, candidates, request, self._ledger, self._routing_config)
            for each in (again, best)
        )
        is_worth_it = again == kept.route and cost <= _MOST_FOR_PREFIX * least
        return SessionPlan(again, kept.codec, kept.packed > 0) if is_worth_it else None

    def expected_s(self, route: Route, round_trips_s: Sequence[float] = ()) -> float | None:
        """Seconds a token over a route, by what is known of its hops; None if a hop or a line is not known.

        Compute, delays and bytes, where no hop fails or lies: what is seen, not what the planner weighs. A
        choice needs some delay for every line, a prediction none that was never measured.

        Args:
            round_trips_s: Of the lines to the first hop, from hop to hop, as the hops say, and from the last
                one; 0 where it is not known. Nobody is chosen by the hops' word.
        """
        now = trio.current_time()
        hops = [
            self._hop_timings.known(candidate, now)
            for candidate in self._candidates(frozenset(), None)
            if candidate.peer_id in route.peer_ids
        ]
        if len(hops) < len(route.hops):
            return None
        request = self._request(1, frozenset(), hops, _codec_of(hops))
        if round_trips_s:
            hops, request = _with_lines(route, hops, request, round_trips_s)
        if not edges_are_known(route, hops, request, self._routing_config):
            return None
        return route_cost(route, hops, request, None, self._routing_config)

    async def _choose(self, candidates: Sequence[Candidate], request: RouteRequest) -> Route:
        """The policy's first choice.

        Raises:
            NoRoute: There is none; it says what else would help.
        """
        now = time.time()
        self._ledger.advance(now)
        for candidate in candidates:
            if candidate.found_in and self._ledger.is_banned(candidate.peer_id):
                self._ledger.note_ranges(candidate.peer_id, candidate.found_in, now)
        try:
            routes = await self._policy_runner.choose_routes(candidates, request, self._ledger)
        except NoRoute as exc:
            more = filter(None, (self._lookalikes(), "" if candidates else self.others_served()))
            raise NoRoute("; ".join((str(exc), *more)), exc.missing, is_full=exc.is_full) from exc
        return routes[0]

    def others_served(self) -> str:
        """Other models that are served here, and how to ask for one; empty if there are none."""
        alike = {self._spec.revision, *(each.revision for each in self._member.lookalikes(self._spec))}
        models = served_models(self._member.models())
        others = [each for each in models if each.revision not in alike]
        return describe_served(others, self._joining)

    def _lookalikes(self) -> str:
        """Reason why peers with the same weights do not count, if there are any."""
        found = self._member.lookalikes(self._spec)
        if not found:
            return ""
        differing = differences(self._spec.numbers, found[0].numbers) or "their configs differ"
        return (
            f"peers with the same weights compute with another config.json "
            f"({found[0].peer_id}: {differing}); make them agree"
        )

    async def find_replacement(self, gap: Gap) -> Route:
        """The policy's best hops for blocks that a running session lost; does not wait for peers to appear.

        Raises:
            NoRoute: Nobody else serves them, as far as is known.
        """
        excluded = gap.excluded | self._cooldowns.peers(trio.current_time())
        candidates = self._candidates(excluded, gap)
        return await self._choose(candidates, self._request(gap.tokens, excluded, candidates, gap.codec, gap))

    async def find_faster(self, gap: Gap, hop: Hop, seconds: float) -> Route | None:
        """Peer that the policy prefers to a hop so slow, if that saves half of its time or more.

        Raises:
            NoRoute: The policy has nobody at all.
        """
        now = trio.current_time()
        self._hop_timings.note(hop.peer_id, len(hop.span), seconds, now)
        excluded = (gap.excluded | self._cooldowns.peers(now)) - {hop.peer_id}
        candidates = [
            self._hop_timings.known(candidate, now) for candidate in self._candidates(excluded, gap)
        ]
        request = self._request(gap.tokens, excluded, candidates, gap.codec, gap)
        route = (await self._policy_runner.choose_routes(candidates, request, self._ledger))[0]
        if hop.peer_id in route.peer_ids or all(each.peer_id != hop.peer_id for each in candidates):
            return None
        slow, other = (
            route_cost(each, candidates, request, self._ledger, self._routing_config)
            for each in (Route((hop,)), route)
        )
        return route if slow - other > _WORTH_CHANGING * seconds else None

    def hop_failed(self, route: Route, error: PeerError) -> None:
        """Note that a hop of `route` failed or refused, and tell the policy."""
        outcome = RouteOutcome(
            ok=False, error=str(error), failed_peer=error.peer_id or None, told_by=error.told_by or None
        )
        if isinstance(error, PeerRefused):  # it has no room, say: no reason to rely on it less
            if error.is_passing and error.fits < LEAST_TOKENS:
                self._cooldowns.rest(error.peer_id, trio.current_time())
            self._policy_runner.tell(route, outcome)
        else:
            self.route_ended(route, outcome)

    def blame(self, error: PeerError) -> None:
        """Note a fault that was found when its session was over; between neighbours, as while it ran."""
        now = time.time()
        if error.told_by:
            self._note_quarrel(error.told_by, error.peer_id, str(error), now)
        elif error.peer_id:
            self._ledger.record_failure(error.peer_id, now, str(error))

    def route_ended(self, route: Route, outcome: RouteOutcome) -> None:
        """Note in the ledger how the hops fared, and tell the policy."""
        for hop, spent_ms in zip(route.hops, outcome.per_hop_ms, strict=False):
            self._hop_timings.note(hop.peer_id, len(hop.span), spent_ms / 1e3, trio.current_time())
        now = time.time()  # the ledger outlives this process
        if outcome.failed_peer and outcome.told_by:
            self._note_quarrel(outcome.told_by, outcome.failed_peer, outcome.error or "", now)
        else:
            for hop in route.hops:
                if outcome.ok:
                    self._ledger.record_success(hop.peer_id, now)
                elif hop.peer_id == outcome.failed_peer:
                    self._ledger.record_failure(hop.peer_id, now, outcome.error or "")
        self._policy_runner.tell(route, outcome)

    def _note_quarrel(self, accuser: str, accused: str, error: str, now: float) -> None:
        """Charge both neighbours, of which one says that the other failed."""
        said = {
            accused: f"{error} (by the word of {accuser} alone)",
            accuser: f"it says of {accused}: {error}",
        }

        def in_standing(peer_id: str) -> bool:
            return not (self._ledger.is_newcomer(peer_id) or self._ledger.is_banned(peer_id))

        shares = self._quarrels.note(accuser, accused, trio.current_time(), in_standing)
        for peer_id, share in shares.items():
            self._ledger.record_failure(peer_id, now, said[peer_id], share=share)

    def _candidates(self, excluded: frozenset[str], gap: Gap | None) -> list[Candidate]:
        """Announced peers, without those just found unreachable if the others have all it takes."""
        host, presence, whereabouts = self._member.host, self._member.presence, self._member.whereabouts
        announced = self._member.announcements(self._spec.revision)
        heard = [each for each in announced if not presence.is_silent(each)]
        wanted = gap.span if gap else BlockSpan(0, self._spec.num_blocks)
        spans = [each.span for each in heard if each.peer_id not in excluded]
        gaps = uncovered(spans, self._spec.num_blocks)
        if any(each.start < wanted.stop and wanted.start < each.stop for each in gaps):
            heard = announced
        return [
            Candidate(
                announcement,
                self._member.rtt_ms(announcement.peer_id),
                relayed=host.connection_kind(announcement.peer_id) == "relayed",
                found_in=whereabouts.found_in(announcement.peer_id),
                named_in=whereabouts.named_in(announcement),
            )
            for announcement in heard
        ]

    def _request(
        self,
        tokens: int,
        excluded: frozenset[str],
        candidates: Sequence[Candidate],
        codec: Codec,
        gap: Gap | None = None,
    ) -> RouteRequest:
        spec = self._spec
        request = RouteRequest(
            spec.revision,
            spec.num_blocks,
            row_bytes(spec.hidden_size, codec),
            tokens,
            excluded,
            self._member.coordinate,
            edges=self._quarrels.edges(trio.current_time()),
            spoilt_ranges=self._ledger.spoilt_ranges(time.time()),
            serve_command=self._serve_command,
            ends=self._is_thin,
            packs=gap is not None and gap.packs,
        )
        if gap is None:
            return request
        by_id = {candidate.peer_id: candidate for candidate in candidates}
        source = by_id.get(gap.before.peer_id) if gap.before else None
        sink = by_id.get(gap.after.peer_id) if gap.after else None
        return replace(request, span=gap.span, source=source, sink=sink)


def _with_lines(
    route: Route, hops: Sequence[Candidate], request: RouteRequest, round_trips_s: Sequence[float]
) -> tuple[list[Candidate], RouteRequest]:
    """Hops and request with what was measured of the lines of a route."""
    ids = route.peer_ids
    own = {ids[0]: round_trips_s[0], ids[-1]: round_trips_s[-1]}
    known = [
        replace(each, rtt_ms=rtt_s * 1e3) if (rtt_s := own.get(each.peer_id, 0.0)) else each for each in hops
    ]
    edges = dict(request.edges)
    for pair, rtt_s in zip(pairwise(ids), round_trips_s[1:-1], strict=True):
        if rtt_s:
            edges[pair] = Edge(rtt_s * 1e3, edges[pair].relayed if pair in edges else False)
    return known, replace(request, edges=edges)


def _codec_of(candidates: Iterable[Candidate]) -> Codec:
    """Codec of a session over all of them."""
    numerics = (each.announcement.numerics for each in candidates)
    return common_codec(each for each in numerics if each is not None)
