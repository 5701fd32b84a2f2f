"""What is broken in a session's chain, whose fault it is, and the attempts to mend it.

Two things break. A hop that is gone is replaced. An edge between two hops that both answer their client is
made anew, since nothing is lost with it; only if that does not help is the hop behind it replaced, and if the
hop before it goes on complaining, that one. What a hop says of its neighbour is hearsay, so the client asks
the neighbour before it believes it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import trio

from p2pinfer.errors import PeerError
from p2pinfer.models.span import BlockSpan
from p2pinfer.routing.route import Hop, Route

from .chain import Chain, NoReplay, Spare
from .hop_stream import HopStream
from .opening import end_all

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gap:
    """Blocks of a running session for which somebody else is needed.

    Attributes:
        span: The blocks.
        tokens: What every hop has to reserve.
        excluded: Who failed the session, and who is part of it.
        before: Who sends to the first replacement; None is the client.
        after: Whom the last one sends to; None is the client.
    """

    span: BlockSpan
    tokens: int
    excluded: frozenset[str]
    before: Hop | None
    after: Hop | None


class Replanner(Protocol):
    """Who finds replacements for hops: the client."""

    async def replacement(self, gap: Gap) -> Route:
        """Hops that cover the gap's span and are not among the excluded; NoRoute if there are none."""
        ...

    async def better(self, gap: Gap, hop: Hop, seconds: float) -> Route | None:
        """Hops to take over from one that takes so long for a step; None if it is best left alone."""
        ...

    def hop_failed(self, route: Route, error: PeerError) -> None:
        """Hear that the hop `error.peer_id` of `route` failed, or refused to become one."""
        ...


class Faults:
    """Notes what is broken, and mends it.

    Attributes:
        failed: The hops to be replaced and why, in the order in which they failed.
        cut: The hops that the one before them does not reach.
        fatal: Why the session is over, and nothing is to be mended any more; None while it goes on.
        shunned: The peers that failed the session or left it; it does not use them again.
    """

    def __init__(
        self,
        chain: Chain,
        replanner: Replanner | None,
        shunned: frozenset[str],
        *,
        max_tokens: int,
        timeout_s: float,
        probe_timeout_s: float,
        max_repairs: int,
    ) -> None:
        self.failed: dict[HopStream, PeerError] = {}
        self.cut: dict[HopStream, PeerError] = {}
        self.fatal: PeerError | None = None
        self.shunned = shunned
        self._chain = chain
        self._replanner = replanner
        self._max_tokens = max_tokens
        self._timeout_s = timeout_s
        self._probe_timeout_s = probe_timeout_s
        self._max_repairs = max_repairs
        self._complaints: Counter[HopStream] = Counter()

    @property
    def first(self) -> PeerError | None:
        """What failed first of all that is broken; None if nothing is."""
        return next(iter((*self.failed.values(), *self.cut.values())), None)

    async def mend(self, upto: int, spare: Spare | None = None) -> None:
        """Make the chain whole: positions `0..upto` in every cache, every hop linked to the next.

        Args:
            spare: Hops that were to take over anyway; used if they fit, else closed.

        Raises:
            PeerError: It cannot be done; the error is that of whoever failed first.
            NoRoute: Nobody can take over.
        """
        first = self.first
        assert first is not None
        if self._replanner is None:
            raise first
        for _ in range(self._max_repairs):
            try:
                await self._mend_something(self._replanner, upto, spare)
            except NoReplay:
                break
            except PeerError as exc:
                logger.debug("session.repair_failed peer=%s why=%s", exc.peer_id, exc)
            spare = None
            if self.first is None:
                return
        raise first

    def gap(self, replaced: Sequence[HopStream]) -> Gap:
        """What would be missing without these adjacent hops."""
        before, after = self._chain.neighbours(replaced)
        return Gap(
            BlockSpan(replaced[0].hop.span.start, replaced[-1].hop.span.stop),
            self._max_tokens,
            self.shunned | {hop.peer_id for hop in self._chain.hops},
            before.hop if before else None,
            after.hop if after else None,
        )

    async def open_spare(
        self, replaced: Sequence[HopStream], timeout_s: float, route: Route | None = None
    ) -> Spare:
        """Find somebody for the blocks of adjacent hops, unless `route` says who, and open the session there.

        Raises:
            NoRoute: There is nobody.
            PeerError: Those who were found cannot; they are shunned, and another try finds others.
        """
        assert self._replanner is not None
        if route is None:
            route = await self._replanner.replacement(self.gap(replaced))
        logger.debug("session.replace %s by %s", [hop.peer_id for hop in replaced], route)
        try:
            return await self._chain.open_spare(replaced, route, timeout_s)
        except PeerError as exc:
            await self._blame(exc, route)
            raise

    async def take_over(self, spare: Spare, upto: int) -> None:
        """Let `spare` take the place of what it replaces, with positions `0..upto` in its caches.

        Raises:
            PeerError: It failed, and is closed, or a neighbour did.
        """
        chain = self._chain
        before, after = chain.neighbours(spare.replaced)
        involved = [*spare.hops, *([before] if before else [])]
        try:
            await chain.attended(involved, partial(chain.take_over, spare, upto))
        except PeerError as exc:
            if spare.hops[0] not in chain.hops:
                await end_all(spare.hops)
                if not isinstance(exc, NoReplay):
                    await self._blame(exc, Route(tuple(hop.hop for hop in spare.hops)))
                raise
        self.shunned |= {hop.peer_id for hop in spare.replaced}
        for hop in spare.replaced:
            self.failed.pop(hop, None)
            self.cut.pop(hop, None)
        if after is not None:
            self.cut.pop(after, None)
        for hop in spare.hops:
            if hop.error is not None:  # since it took over
                self.failed.setdefault(hop, hop.error)

    async def _mend_something(self, replanner: Replanner, upto: int, spare: Spare | None) -> None:
        """Close the first gap; if there is none, make the first broken edge anew."""
        hops = self._chain.hops
        start = next((index for index, hop in enumerate(hops) if hop in self.failed), None)
        if start is None:
            if spare is not None:
                await end_all(spare.hops)
            await self._mend_edge(next(iter(self.cut)))
            return
        stop = start + 1
        while stop < len(hops) and hops[stop] in self.failed:
            stop += 1
        replaced = tuple(hops[start:stop])
        if spare is not None and spare.replaced != replaced:
            await end_all(spare.hops)
            spare = None
        for hop in replaced:
            if hop.peer_id not in self.shunned:
                self.shunned |= {hop.peer_id}
                replanner.hop_failed(self._chain.route, _error_of(hop, self.failed[hop]))
        if spare is None:
            spare = await self.open_spare(replaced, self._timeout_s)
        await self.take_over(spare, upto)

    async def _mend_edge(self, hop: HopStream) -> None:
        before, _ = self._chain.neighbours([hop])
        assert before is not None
        error = self.cut[hop]
        self._complaints[before] += 1
        if self._complaints[before] > 2:
            self.failed[before] = type(error)(str(error), before.peer_id)
            del self.cut[hop]
            return
        if self._complaints[before] == 1:
            with trio.move_on_after(self._timeout_s):
                try:
                    if await hop.probe(self._probe_timeout_s, ask_successor=False) is not None:
                        await self._chain.reattach(hop)
                        del self.cut[hop]
                        return
                except PeerError as exc:
                    logger.debug("session.edge_lost peer=%s why=%s", hop.peer_id, exc)
        del self.cut[hop]
        if before.error is None:
            self.failed.setdefault(hop, error)

    async def _blame(self, error: PeerError, route: Route) -> None:
        """Decide who is not to be tried again after `route` could not take over."""
        if self._replanner is not None and error.peer_id in route.peer_ids:
            self.shunned |= {error.peer_id}
            self._replanner.hop_failed(route, error)
            return
        named = next((hop for hop in self._chain.hops if hop.peer_id == error.peer_id), None)
        if named is not None and await named.probe(self._probe_timeout_s, ask_successor=False) is None:
            self.failed.setdefault(named, error)
        else:
            self.shunned |= set(route.peer_ids)


def _error_of(hop: HopStream, error: PeerError) -> PeerError:
    """The error, if it names the hop; else one of the same words that does."""
    if error.peer_id == hop.peer_id:
        return error
    return PeerError(str(error), hop.peer_id)
