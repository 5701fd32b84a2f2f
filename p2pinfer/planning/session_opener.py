"""Opening of a client's sessions: with the client's settings, its auditor, and an adapter if there is one."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Protocol

import trio

from p2pinfer.client_config import SessionConfig
from p2pinfer.events import Report
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.numerics import row_bytes
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.draws import Draw
from p2pinfer.node.protocol.messages import Prefix
from p2pinfer.routing.route import Hop, Route
from p2pinfer.session.chain import ReplaySource
from p2pinfer.session.hosting import open_session, start_session
from p2pinfer.session.session import Session
from p2pinfer.session.terms import PLAIN, Packing, SessionAdapter

from .reachable_routes import ReachableRoutes
from .route_planner import SessionPlan
from .uplink import Uplink

logger = logging.getLogger(__name__)


class Auditor(Protocol):
    """Chooser of hops that are checked after a session."""

    def toss(self, route: Route) -> frozenset[str]:
        """Peers of a route whose work is to be kept for an audit."""
        ...

    def is_banned(self, peer_id: str) -> bool:
        """True if sessions are not to go on over this peer."""
        ...

    def session_closed(self, session: Session, chosen: frozenset[str]) -> None:
        """Take over what was kept."""
        ...


@dataclass(frozen=True, slots=True)
class SessionOpener:
    """Everything that a client's sessions share."""

    host: Network
    nursery: trio.Nursery
    spec: ModelSpec
    config: SessionConfig
    routes: ReachableRoutes
    auditor: Auditor | None
    report: Report | None
    uplink: Uplink = field(default_factory=Uplink)

    async def open_on(
        self,
        plan: SessionPlan,
        tokens: int,
        excluded: frozenset[str],
        replay_source: ReplaySource | None,
        adapter: SessionAdapter | None,
        draw: Draw | None = None,
        prefix: Prefix | None = None,
        packing: Packing = PLAIN,
    ) -> Session:
        """A session on the route of a plan, behind a `prefix` as far as its hops still have that.

        Its prompt travels packed if that is wished and all hops take it.

        Raises:
            PeerError: A hop of the route could not be reached or refused.
        """
        route, auditor = plan.route, self.auditor
        logger.debug("session.open route=%s codec=%s", route, plan.codec)
        chosen = {*auditor.toss(route)} if auditor else set[str]()
        plain_bytes = packing.tokens * row_bytes(self.spec.hidden_size, plan.codec)
        is_packed = plan.packs and (not packing.if_slow or self.uplink.is_slow_for(plain_bytes))

        def closed(session: Session) -> None:
            self.uplink.note(session.chain.hops[0].line)
            if auditor is not None:
                auditor.session_closed(session, frozenset(chosen))

        # What policies may choose all the same: that they were banned before is no news.
        known_liars = {each for each in route.peer_ids if auditor and auditor.is_banned(each)}

        def is_unwanted(peer_id: str) -> bool:
            return auditor is not None and peer_id not in known_liars and auditor.is_banned(peer_id)

        def joined(hops: tuple[Hop, ...]) -> bool:
            # The first coin was tossed for the hops of the beginning. Without one of their own, hops that
            # replaced them would know that nobody checks them.
            drawn = auditor.toss(Route(hops)) if auditor is not None else frozenset[str]()
            chosen.update(drawn)
            known_liars.update(hop.peer_id for hop in hops if auditor and auditor.is_banned(hop.peer_id))
            return bool(drawn)

        opening = open_session(
            self.host,
            route,
            self.spec,
            max_tokens=tokens,
            codec=plan.codec,
            config=self.config,
            replay_source=replay_source,
            replanner=self.routes,
            excluded=excluded,
            keep_steps=bool(chosen),
            on_joined=joined,
            is_unwanted=is_unwanted,
            report=self.report,
            adapter=adapter,
            prefix=prefix,
            draw=draw,
            packed=packing.tokens if is_packed else 0,
        )
        return await start_session(self.nursery, opening, on_closed=closed)
