"""Handover from hops that still work: from one that leaves, and from one that is slow.

A hop that has become slow, or is about to go, works on until somebody else has been fed what it knows; then
they take its place between two steps. One place is handed over at a time. A hop that fails meanwhile comes
first: its repair (`failover.py`) may use those who were being fed, if they were meant for that place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Final

import trio

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import P2PInferError, PeerError, PeerVanished
from p2pinfer.node.protocol.messages import Bill
from p2pinfer.routing.route import Route

from .chain import Chain, Replacement
from .failover import Failover, Replanner
from .faults import Faults
from .hop_stream import HopStream
from .in_flight import InFlight
from .liveness import attended
from .opening import end_all
from .stragglers import Stragglers

logger = logging.getLogger(__name__)

_SETTLED_TOKENS: Final = 32  # a replacement that lacks no more than this is warm enough to take over
LOOK_EVERY: Final = 4  # decode steps, whose timings are looked at together
_MAX_ROUNDS: Final = 6  # of catching up with a session that goes on


class Handovers:
    """Has others take over, if a replanner names any.

    Attributes:
        done: How often a hop that still worked was replaced.
        busy: Held while somebody is to take over.
        replacement: Who is being fed for it. What a step rolls back, they have not got any more.
        unseen: What hops took for the latest steps, and tokens of each, put in by whoever times them.
    """

    def __init__(
        self,
        chain: Chain,
        failover: Failover,
        faults: Faults,
        steps: InFlight,
        replanner: Replanner | None,
        nursery: trio.Nursery,
        config: SessionConfig,
        on_done: Callable[[HopStream], None],
    ) -> None:
        """`on_done` hears of every handover."""
        self.done = 0
        self.busy = trio.Lock()
        self.replacement: Replacement | None = None
        self._chain = chain
        self._failover = failover
        self._faults = faults
        self._steps = steps
        self._replanner = replanner
        self._nursery = nursery
        self._config = config
        self._on_done = on_done
        self.unseen: list[tuple[tuple[Bill, ...], int]] = []
        self._stragglers = Stragglers(config.slow_step_s)
        self._warming: trio.CancelScope | None = None
        self._improving = trio.CancelScope()

    async def replace(self, peer_id: str, route: Route | None = None) -> None:
        """Put others in place of a hop that still works, between two steps; steps go on meanwhile.

        Args:
            route: Who is to take over; whom the replanner names, if None.

        Raises:
            NoRoute: There is nobody else. The session is as it was, here and in what follows.
            PeerError: Those who were to take over failed, or a hop of the session did meanwhile.
            ValueError: The peer is no hop of this session, or another one is being replaced.
        """
        hop = next((each for each in self._chain.hops if each.peer_id == peer_id), None)
        if hop is None or self._warming is not None or self._replanner is None:
            raise ValueError(f"{peer_id} cannot be replaced: no hop, or not the only one to be replaced")
        with trio.CancelScope() as self._warming:
            try:
                await self._hand_over(hop, route)
            finally:
                self._warming = None
                # Neither taken over nor handed to a repair by `break_off`: nobody else would end it.
                if self.replacement is not None:
                    replacement, self.replacement = self.replacement, None
                    await end_all(replacement.hops)
        if hop in self._chain.hops:
            raise PeerVanished("a hop failed while another one was being replaced", peer_id)

    def replace_leaving(self, hop: HopStream) -> None:
        """Have another one take over from a hop that is about to go."""
        if self._replanner is not None:
            self._nursery.start_soon(self._replace_leaving, hop)

    def look_for_stragglers(self) -> None:
        """Look for somebody faster if the latest steps show that a hop has become slow."""
        for bills, tokens in self.unseen:
            self._stragglers.note(bills, tokens)
        self.unseen.clear()
        slow = self._stragglers.take_slowest(trio.current_time())
        # Nothing queues up behind a handover: by the time it ended the timings would be of other hops.
        if slow is not None and self._replanner is not None and not self.busy.locked():
            place, seconds = slow
            self._nursery.start_soon(self._improve, self._replanner, self._chain.hops[place], seconds)

    def forget_timings(self) -> None:
        """Begin anew: what was measured is of hops that are not there any more."""
        self.unseen.clear()
        self._stragglers.forget()

    def note_rolled_back(self, position: int) -> None:
        """Note that a replacement lacks what is sent from `position` on: it has to be replayed."""
        if self.replacement is not None:
            self.replacement.filled = min(self.replacement.filled, position)

    def break_off(self) -> Replacement | None:
        """Stop handing over, since a hop failed; returns the replacement, for the repair to use or end."""
        replacement, self.replacement = self.replacement, None
        if self._warming is not None:
            self._warming.cancel()
        if replacement is not None:
            replacement.filled = 0  # how far it was fed is not known
        return replacement

    async def _hand_over(self, hop: HopStream, route: Route | None) -> None:
        chain, steps = self._chain, self._steps
        replacement = self.replacement = await self._failover.open_replacement(
            [hop], self._config.open_timeout_s, route
        )
        involved = [*replacement.hops, *chain.neighbours([hop])[:1]]
        living = [each for each in involved if each is not None]
        # Each round replays what came during the one before, so the rest shrinks while steps go on. A session
        # that outruns its replacement would never end this; what is left after some rounds is replayed in the
        # pause below.
        for _ in range(_MAX_ROUNDS):
            # Not `length`: a step under way may be giving positions below it another content.
            if steps.confirmed - replacement.filled <= _SETTLED_TOKENS:
                break
            limit_s = chain.replay_limit_s(replacement, steps.confirmed)
            await attended(living, partial(chain.fill, replacement, steps.confirmed), self._config, limit_s)
        async with steps.quiescent():
            # Looked at again: a repair goes before whoever waits here, and may have used or closed the
            # replacement.
            if self._faults.fatal or self._faults.first or hop not in chain.hops:
                return  # a failure came first
            await self._failover.take_over(replacement, steps.length)
            self.replacement = None
            self.done += 1
            self.forget_timings()
            self._on_done(hop)

    async def _replace_leaving(self, hop: HopStream) -> None:
        async with self._steps.lock:  # not while it takes over
            self._improving.cancel()
        async with self.busy:
            for _ in range(self._config.max_repairs):
                if not await self._try_to_replace(hop):
                    break

    async def _try_to_replace(self, hop: HopStream) -> bool:
        """False if that is all that can be done."""
        try:
            await self.replace(hop.peer_id)
        except PeerError as exc:  # of who was asked; others may have room
            logger.debug("session.handover_failed peer=%s why=%s", exc.peer_id, exc)
            return True
        except (P2PInferError, ValueError) as exc:
            logger.info("nobody takes over from %s before it leaves: %s", hop.peer_id, exc)
        return False

    async def _improve(self, replanner: Replanner, hop: HopStream, seconds: float) -> None:
        """Have somebody faster take over from a hop that takes so long for a step, if there is anybody."""
        with trio.CancelScope() as self._improving:
            async with self.busy:
                try:
                    route = await replanner.find_faster(self._failover.gap([hop]), hop.hop, seconds)
                    if route is None:
                        return
                    logger.info(
                        "%s takes %.0f ms for a step; %s is to do better", hop.peer_id, seconds * 1e3, route
                    )
                    await self.replace(hop.peer_id, route)
                except (P2PInferError, ValueError) as exc:
                    logger.info("nobody better takes over from %s: %s", hop.peer_id, exc)
