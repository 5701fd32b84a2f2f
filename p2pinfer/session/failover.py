"""Failover: finds which hops of a chain are broken, and tries to replace them.

Two things break. A hop that is gone is replaced. An edge between two hops that both answer their client is
made anew, since nothing is lost with it; only if that does not help is the hop behind it replaced, and if the
hop before it goes on complaining, that one. What a hop says of its neighbour is hearsay, so the client asks
the neighbour before it believes it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

import trio

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import PeerError, PeerVanished
from p2pinfer.models.numerics import Codec
from p2pinfer.models.span import BlockSpan
from p2pinfer.routing.route import Hop, Route

from .chain import Chain, NoReplay, Replacement
from .faults import Faults
from .hop_stream import HopStream
from .liveness import attended
from .opening import end_all

logger = logging.getLogger(__name__)

IsUnwanted: TypeAlias = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Gap:
    """Blocks of a running session that need another peer.

    Attributes:
        span: The blocks.
        tokens: What every hop has to reserve.
        excluded: Who failed the session, and who is part of it.
        before: Who sends to the first replacement; None is the client.
        after: Whom the last one sends to; None is the client.
        codec: How hidden states travel in that session, whoever joins it.
        packs: Some of them travel packed.
    """

    span: BlockSpan
    tokens: int
    excluded: frozenset[str]
    before: Hop | None
    after: Hop | None
    codec: Codec
    packs: bool = False


class Replanner(Protocol):
    """Source of replacements for hops: the client."""

    async def find_replacement(self, gap: Gap) -> Route:
        """Hops that cover the gap's span and are not among the excluded; NoRoute if there are none."""
        ...

    async def find_faster(self, gap: Gap, hop: Hop, seconds: float) -> Route | None:
        """Hops to take over from one that takes so long for a step; None if it is best left alone."""
        ...

    def hop_failed(self, route: Route, error: PeerError) -> None:
        """Hear that the hop `error.peer_id` of `route` failed, or refused to become one."""
        ...


class Failover:
    """Mends what is noted as broken."""

    def __init__(
        self,
        chain: Chain,
        faults: Faults,
        replanner: Replanner | None,
        config: SessionConfig,
        is_unwanted: IsUnwanted,
    ) -> None:
        """Mend nothing without a `replanner`; end the session once a hop of it `is_unwanted`."""
        self._chain = chain
        self._faults = faults
        self._replanner = replanner
        self._config = config
        self._is_unwanted = is_unwanted
        self._complaints: Counter[HopStream] = Counter()

    async def mend(self, upto: int, replacement: Replacement | None = None) -> None:
        """Make the chain whole: positions `0..upto` in every cache, every hop linked to the next.

        Args:
            replacement: Hops that were to take over anyway; used if they fit, else closed.

        Raises:
            PeerError: It cannot be done; the error is that of whoever failed first.
            NoRoute: Nobody can take over.
        """
        first = self._faults.first
        assert first is not None
        if self._replanner is None:
            raise first
        for _ in range(self._config.max_repairs):
            try:
                await self._mend_something(self._replanner, upto, replacement)
            # Whoever else took over would lack the same past. Only a new session, which prefills it, helps.
            except NoReplay:
                break
            except PeerError as exc:
                logger.debug("session.repair_failed peer=%s why=%s", exc.peer_id, exc)
            # Used or closed by the first attempt, whichever it was.
            replacement = None
            if self._faults.first is None:
                return
        raise first

    def leave_unwanted(self) -> None:
        """Let the session be over if a hop of it turned out to be a liar.

        It is not replaced: hops behind it have in their caches what they made of its lies. In a new session
        they are given the tokens.
        """
        for hop in self._chain.hops:
            if self._is_unwanted(hop.peer_id):
                self._faults.give_up(PeerError("banned while it took part", hop.peer_id))

    def gap(self, replaced: Sequence[HopStream]) -> Gap:
        """Blocks that would be missing without these adjacent hops."""
        before, after = self._chain.neighbours(replaced)
        return Gap(
            BlockSpan(replaced[0].hop.span.start, replaced[-1].hop.span.stop),
            self._chain.terms.max_tokens,
            self._faults.excluded | {hop.peer_id for hop in self._chain.hops},
            before.hop if before else None,
            after.hop if after else None,
            self._chain.terms.codec,
            self._chain.terms.packed > 0,
        )

    async def open_replacement(
        self, replaced: Sequence[HopStream], timeout_s: float, route: Route | None = None
    ) -> Replacement:
        """Find somebody for the blocks of adjacent hops, unless `route` says who, and open the session there.

        Raises:
            NoRoute: There is nobody.
            PeerError: Those who were found cannot; they are excluded, and another try finds others.
        """
        assert self._replanner is not None
        if route is None:
            route = await self._replanner.find_replacement(self.gap(replaced))
        logger.debug("session.replace %s by %s", [hop.peer_id for hop in replaced], route)
        try:
            return await self._chain.open_replacement(replaced, route, timeout_s)
        except PeerError as exc:
            await self._blame(exc, route)
            raise

    async def take_over(self, replacement: Replacement, upto: int) -> None:
        """Let `replacement` take the place of what it replaces, with positions `0..upto` in its caches.

        Raises:
            PeerError: It failed, and is closed, or a neighbour did.
        """
        chain = self._chain
        before, after = chain.neighbours(replacement.replaced)
        involved = [*replacement.hops, *([before] if before else [])]
        try:
            limit_s = chain.replay_limit_s(replacement, upto)
            await attended(involved, partial(chain.take_over, replacement, upto), self._config, limit_s)
        except PeerError as exc:
            # A sign of life may fail to come in the very moment in which the take-over succeeds. Then the
            # replacement is the chain: ending it would end the session, and the fault is noted below like any
            # other.
            if replacement.hops[0] not in chain.hops:
                await end_all(replacement.hops)
                # A past that nobody has kept is the fault of none of them.
                if not isinstance(exc, NoReplay):
                    await self._blame(exc, Route(tuple(hop.hop for hop in replacement.hops)))
                raise
        self._faults.note_replaced(replacement.replaced)
        if after is not None:
            self._faults.note_joined(after)
        # `Session.on_lost` passes over hops that are not part of the chain, so one that was lost just before
        # it became a part is looked for here; nobody else would notice.
        for hop in replacement.hops:
            if hop.error is not None:  # since it took over
                self._faults.note_failed(hop, hop.error)

    async def _mend_something(self, replanner: Replanner, upto: int, replacement: Replacement | None) -> None:
        """Close the first gap; if there is none, make the first broken edge anew."""
        hops, failed = self._chain.hops, self._faults.failed
        # Hops before edges: an edge of a hop that is gone cannot be made anew, and whoever replaces the hop
        # brings both of its edges along.
        start = next((index for index, hop in enumerate(hops) if hop in failed), None)
        if start is None:
            if replacement is not None:
                await end_all(replacement.hops)
            await self._mend_edge(next(iter(self._faults.cut)))
            return
        # Adjacent failures are one gap: replaced one by one, each would have a dead hop as its
        # neighbour.
        stop = start + 1
        while stop < len(hops) and hops[stop] in failed:
            stop += 1
        replaced = tuple(hops[start:stop])
        if replacement is not None and replacement.replaced != replaced:
            await end_all(replacement.hops)
            replacement = None
        # Reported once, however many attempts the gap takes: every report costs the peer reliability.
        for hop in replaced:
            if hop.peer_id not in self._faults.excluded:
                self._faults.exclude(hop.peer_id)
                replanner.hop_failed(self._chain.route, _error_of(hop, failed[hop]))
        if replacement is None:
            replacement = await self.open_replacement(replaced, self._config.repair_timeout_s)
        await self.take_over(replacement, upto)

    async def _mend_edge(self, hop: HopStream) -> None:
        before, _ = self._chain.neighbours([hop])
        assert before is not None
        error = self._faults.cut[hop]
        # The first complaint costs nobody anything if the edge can be made anew, the second one the hop
        # behind, the third one who complains: it is what those edges have in common. Believing it every time
        # would let a hop have its honest successors replaced one after the other.
        self._complaints[before] += 1
        fault = await self._rejoin(hop, error) if self._complaints[before] == 1 else error
        if self._complaints[before] > 2:
            self._faults.note_failed(before, type(error)(str(error), before.peer_id))
        elif fault is None:
            logger.debug("session.edge_mended peer=%s", hop.peer_id)
        elif before.error is None:
            self._faults.note_failed(hop, fault)
        self._faults.note_joined(hop)

    async def _rejoin(self, hop: HopStream, complaint: PeerError) -> PeerError | None:
        """Make the edge into a hop anew, if the hop is there; returns what speaks against it if that fails.

        Only what this process sees for itself is the hop's own failure.
        """
        with trio.move_on_after(self._config.repair_timeout_s):
            try:
                if await hop.probe(self._config.probe_timeout_s, ask_successor=False) is None:
                    return PeerVanished("it does not answer pings", hop.peer_id)
                await self._chain.reattach(hop)
                return None
            except PeerError as exc:
                logger.debug("session.edge_lost peer=%s why=%s", hop.peer_id, exc)
        return complaint

    async def _blame(self, error: PeerError, route: Route) -> None:
        """Decide who is not to be tried again after `route` could not take over."""
        if self._replanner is not None and error.peer_id in route.peer_ids:
            self._faults.exclude(error.peer_id)
            self._replanner.hop_failed(route, error)
            return
        named = next((hop for hop in self._chain.hops if hop.peer_id == error.peer_id), None)
        if named is not None and await named.probe(self._config.probe_timeout_s, ask_successor=False) is None:
            self._faults.note_failed(named, error)
        # The hop that was named answers us, so it is one word against another. Others are tried for the
        # place, and nobody's record suffers.
        else:
            self._faults.exclude(*route.peer_ids)


def _error_of(hop: HopStream, error: PeerError) -> PeerError:
    """The error, if it names the hop; else one of the same words that does."""
    if error.peer_id == hop.peer_id:
        return error
    return PeerError(str(error), hop.peer_id)
