"""Source of sessions for a text with terms of its own: an adapter, or draws at the last hop."""

from __future__ import annotations

from typing import Literal, Protocol

import trio

from p2pinfer.node.protocol.draws import Draw
from p2pinfer.routing.route import Route, RouteOutcome
from p2pinfer.session.chain import ReplaySource
from p2pinfer.session.session import Session
from p2pinfer.session.terms import PLAIN, Packing, SessionAdapter

from .remote_blocks import SessionSource


class AdaptingSource(SessionSource, Protocol):
    """Source of sessions that may have terms of their own: the client."""

    async def open_session(
        self,
        tokens: int,
        excluded: frozenset[str],
        replay_source: ReplaySource | None = None,
        adapter: SessionAdapter | None = None,
        draw: Draw | None = None,
        *,
        packing: Packing = PLAIN,
    ) -> Session:
        """A session, with an adapter if one is given, that draws if there are terms for it."""
        ...


class AdaptedSessions:
    """Source of a generation's sessions, all with one adapter, or by the same draws."""

    def __init__(
        self, source: AdaptingSource, adapter: SessionAdapter | None = None, draw: Draw | None = None
    ) -> None:
        self._source = source
        self._adapter = adapter
        self._draw = draw

    @property
    def table_changed(self) -> trio.Event:
        """See `SessionSource`."""
        return self._source.table_changed

    async def open_session(
        self,
        tokens: int,
        excluded: frozenset[str],
        replay_source: ReplaySource | None = None,
        *,
        packing: Packing = PLAIN,
    ) -> Session:
        """See `SessionSource`."""
        return await self._source.open_session(
            tokens, excluded, replay_source, self._adapter, self._draw, packing=packing
        )

    def route_ended(self, route: Route, outcome: RouteOutcome) -> None:
        """See `SessionSource`."""
        self._source.route_ended(route, outcome)

    def connection_kind(self, peer_id: str) -> Literal["direct", "relayed"]:
        """See `SessionSource`."""
        return self._source.connection_kind(peer_id)
