"""Hops that a trainer has sessions on: all blocks are covered, and whoever fails is replaced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import trio

from p2pinfer.errors import NoRoute, PeerError, PeerRefused
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.numerics import Codec
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.network import Network
from p2pinfer.routing.route import Hop, Route
from p2pinfer.session.failover import Gap

from .link_opening import open_link
from .pass_watch import PassWatch
from .train_link import TrainLink

logger = logging.getLogger(__name__)

TRAINED_TOKENS: Final = 1  # of cache, which passes do not use
PAUSE_S: Final = 0.25  # between two looks for a route, if there is no news in between


class Plan(Protocol):
    """A route, and what travels over it."""

    @property
    def route(self) -> Route: ...
    @property
    def codec(self) -> Codec: ...


class Routes(Protocol):
    """Source of routes: the client's planner."""

    async def plan_session(self, tokens: int, excluded: frozenset[str]) -> Plan:
        """A route for all blocks; NoRoute if there is none."""
        ...

    async def find_replacement(self, gap: Gap) -> Route:
        """Hops that cover the gap's span; NoRoute if there are none."""
        ...

    def hop_failed(self, route: Route, error: PeerError) -> None:
        """Hear that a hop failed or refused."""
        ...


class TrainRoute:
    """Links to the hops of all blocks.

    Attributes:
        links: In the order of their blocks.
        codec: How hidden states and gradients travel, once there is a route.
    """

    def __init__(
        self,
        host: Network,
        spec: ModelSpec,
        routes: Routes,
        nursery: trio.Nursery,
        table_changed: Callable[[], trio.Event],
        wait_s: float,
        watch: PassWatch | None = None,
    ) -> None:
        """Links whose tasks run in `nursery`; for the others see `open_trainer`."""
        self.codec: Codec = "float32"
        self.links: list[TrainLink] = []
        self._host = host
        self._spec = spec
        self._routes = routes
        self._nursery = nursery
        self._table_changed = table_changed
        self._wait_s = wait_s
        self._watch = watch
        self._failed: frozenset[str] = frozenset()
        self._mending = trio.Lock()

    async def link_at(self, block: int) -> TrainLink:
        """The link to the hop of a block; waits until there is one."""
        while True:
            self._drop_banned()
            for link in self.links:
                if link.hop.span.start <= block < link.hop.span.stop and link.failure is None:
                    return link
            await self.mend()

    def _drop_banned(self) -> None:
        """Use no hop any more that was found to be a liar."""
        watch = self._watch
        for link in (
            [] if watch is None else [each for each in self.links if watch.is_banned(each.hop.peer_id)]
        ):
            self.drop(link, PeerRefused("its passes are wrong", link.hop.peer_id, "banned"))

    def drop(self, link: TrainLink, error: PeerError) -> None:
        """Use a hop no more, and tell the planner why."""
        link.give_up(error)
        if link in self.links:
            self.links.remove(link)
            self._failed |= {link.hop.peer_id}
            logger.info("hop %s of blocks %s failed: %s", link.hop.peer_id, link.hop.span, error)
            self._tell(link.hop, error)
            self._nursery.start_soon(link.close)

    def _tell(self, hop: Hop, error: PeerError) -> None:
        error.peer_id = error.peer_id or hop.peer_id
        self._routes.hop_failed(Route((hop,)), error)

    async def mend(self) -> None:
        """Have links to hops of all blocks.

        Raises:
            NoRoute: Nobody serves some of them, and nobody came in time.
        """
        async with self._mending:
            self._drop_banned()
            for link in [each for each in self.links if each.failure is not None]:
                assert link.failure is not None
                self.drop(link, link.failure)
            deadline = trio.current_time() + self._wait_s
            last: PeerError | None = None
            while gap := self._gap():
                changed = self._table_changed()
                try:
                    hops = await self._find(gap)
                except NoRoute as exc:
                    if trio.current_time() >= deadline:
                        why = str(exc) if last is None else f"{exc}; the last peer that was tried: {last}"
                        raise NoRoute(why, exc.missing, is_full=exc.is_full) from exc
                    self._failed = frozenset()  # they may be back, and are better than nobody
                    with trio.move_on_after(PAUSE_S):
                        await changed.wait()
                    await trio.sleep(PAUSE_S)
                    continue
                last = await self._open(hops) or last

    def _gap(self) -> BlockSpan | None:
        """The first blocks that no hop is linked for."""
        at = 0
        for link in self.links:
            if link.hop.span.start > at:
                return BlockSpan(at, link.hop.span.start)
            at = link.hop.span.stop
        return BlockSpan(at, self._spec.num_blocks) if at < self._spec.num_blocks else None

    async def _find(self, gap: BlockSpan) -> Sequence[Hop]:
        if not self.links:
            plan = await self._routes.plan_session(TRAINED_TOKENS, self._failed)
            self.codec = (
                "float32" if plan.codec == "float16" else plan.codec
            )  # gradients fall below its range
            return plan.route.hops
        wanted = Gap(gap, TRAINED_TOKENS, self._failed, None, None, self.codec)
        return (await self._routes.find_replacement(wanted)).hops

    async def _open(self, hops: Sequence[Hop]) -> PeerError | None:
        """Link to those hops that let us; returns why one of the others does not."""
        failures: list[PeerError] = []

        async def link_to(hop: Hop) -> None:
            try:
                link = await open_link(self._host, hop, self._spec, self.codec, self._watch)
            except PeerError as exc:
                failures.append(exc)
                self._failed |= {hop.peer_id}
                if not isinstance(exc, PeerRefused):  # who only does not train is a good hop for texts
                    self._tell(hop, exc)
                return
            self.links.append(link)
            self._nursery.start_soon(link.read)

        async with trio.open_nursery() as nursery:
            for hop in hops:
                nursery.start_soon(link_to, hop)
        self.links.sort(key=lambda link: link.hop.span.start)
        return failures[-1] if failures else None

    async def close(self) -> None:
        """End the sessions on all hops."""
        for link in self.links:
            await link.close()
