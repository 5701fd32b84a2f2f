"""Opening of a session behind one that is over, on the hops that keep its cache."""

from __future__ import annotations

import logging

from p2pinfer.errors import PeerError
from p2pinfer.node.protocol.draws import Draw
from p2pinfer.node.protocol.messages import Prefix
from p2pinfer.session.chain import ReplaySource
from p2pinfer.session.session import Session
from p2pinfer.session.terms import KeptSession, Packing

from .route_planner import RoutePlanner
from .session_opener import SessionOpener

logger = logging.getLogger(__name__)


class PrefixOpener:
    """Opens sessions of one client behind others."""

    def __init__(self, planner: RoutePlanner, opener: SessionOpener) -> None:
        self._planner = planner
        self._opener = opener

    async def open(
        self,
        kept: KeptSession,
        tokens: int,
        excluded: frozenset[str],
        replay_source: ReplaySource,
        draw: Draw | None = None,
        packed: int = 0,
    ) -> Session | None:
        """A session for `tokens` positions behind `kept`, without the `excluded` peers.

        None if one of its hops is gone or refuses, or if another route is that much better. Then a session is
        opened like any other.
        """
        # Whoever has hung up may be asked again, but not while a text waits that others can compute.
        if any(self._opener.host.connection_kind(peer_id) is None for peer_id in kept.route.peer_ids):
            return None
        plan = await self._planner.plan_again(kept, tokens, excluded)
        if plan is None:
            return None
        prefix, packing = Prefix(kept.session, kept.tokens), Packing(packed)
        try:
            return await self._opener.open_on(
                plan, tokens, excluded, replay_source, None, draw, prefix, packing
            )
        except PeerError as exc:
            logger.debug("session.no_prefix peer=%s why=%s", exc.peer_id, exc)
            self._planner.hop_failed(plan.route, exc)
            return None
