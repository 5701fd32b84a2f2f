"""Repair of a session: mends its chain after a fault, and sends steps again."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from p2pinfer.errors import NoRoute, PeerError

from .chain import Chain
from .failover import Failover
from .faults import Faults
from .handover import Handovers
from .in_flight import InFlight, SentStep
from .reporter import Reporter

logger = logging.getLogger(__name__)


class Repair:
    """Repairs one session.

    Attributes:
        done: How often the chain was made whole again.
    """

    def __init__(
        self,
        chain: Chain,
        faults: Faults,
        failover: Failover,
        handovers: Handovers,
        steps: InFlight,
        reporter: Reporter,
        push: Callable[[SentStep], Awaitable[None]],
    ) -> None:
        """`push` sends a step to the first hop."""
        self.done = 0
        self._chain = chain
        self._faults = faults
        self._failover = failover
        self._handovers = handovers
        self._steps = steps
        self._reporter = reporter
        self._push = push

    async def keep_repaired(self) -> None:
        """Repair the chain whenever something is broken; returns when the session is over."""
        faults = self._faults
        while faults.fatal is None:
            await faults.any()
            if faults.fatal is None:
                await self._repair()
        assert faults.fatal is not None
        self._steps.fail_all(faults.fatal)

    async def _repair(self) -> None:
        """Mend what is broken, and send again what has no result; or give the session up."""
        began_at, former = trio.current_time(), self._chain.route.peer_ids
        async with self._steps.repairing():
            if not await self._is_mended():
                return
            self.done += 1
            self._handovers.forget_timings()
            present = self._chain.route
            replaced = [each for each in former if each not in present.peer_ids]
            self._reporter.replaced(replaced, self._chain.hops, "failure")
            # With the lock still held: a step that overtook these would begin behind a position nobody has.
            for each in self._steps.begin_anew(self._chain.epoch):
                await self._push(each)
        logger.info("the chain is whole again after %.2f s: %s", trio.current_time() - began_at, present)

    async def _is_mended(self) -> bool:
        """Mend what is broken; False if the session has to be given up, or nothing is broken any more."""
        faults, first = self._faults, self._faults.first
        if first is None or faults.fatal is not None:
            return False
        try:
            # A step that rolls back may have overwritten, in living hops, what the step before it read. The
            # caches cannot be brought to the state between the two, so the generation starts over with the
            # token ids.
            if not self._steps.may_begin_anew:
                raise first
            await self._failover.mend(self._steps.confirmed, self._handovers.break_off())
        except NoRoute as exc:
            first.__cause__ = exc
            faults.give_up(first)
        except PeerError as exc:
            faults.give_up(exc)
        return faults.fatal is None
