"""Runner of a routing policy, which may be anybody's code and may cost a warning at most.

The policy thinks in a thread, within a time limit. When it raises, returns nonsense or chooses a peer that
must not be used, the default policy answers this once, unless the policy forbids it (`stand_in`). A policy
that hangs is not asked again, since its thread cannot be ended; the built-in ones do not hang, and are waited
for on a computer that is very busy. How routes fared is told one by one, in a thread too, in the order it
happened.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import trio

from p2pinfer.errors import PolicyError
from p2pinfer.reputation.view import ReputationView
from p2pinfer.routing.policy import RoutingPolicy, ask_policy, tell_policy
from p2pinfer.routing.route import Candidate, Route, RouteOutcome, RouteRequest

logger = logging.getLogger(__name__)

_MAX_UNTOLD = 64  # outcomes that wait to be told; more are dropped, so that a slow listener fills no memory


class PolicyRunner:
    """A policy and the one that stands in for it.

    Args:
        fallback: Answers when `policy` does not; of our own make.
        timeout_s: How long the policy may think, about a route or about an outcome.
    """

    def __init__(self, policy: RoutingPolicy, fallback: RoutingPolicy, timeout_s: float) -> None:
        self.policy = policy
        self._fallback = fallback
        self._timeout_s = timeout_s
        self._hangs = False
        self._said = ""
        self._untold, self._outcomes = trio.open_memory_channel[tuple[Route, RouteOutcome]](_MAX_UNTOLD)
        self._all_told = trio.Event()
        self._listens = type(policy).on_result is not RoutingPolicy.on_result

    async def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> list[Route]:
        """The policy's routes, or the fallback's with a warning that says why.

        Raises:
            NoRoute: The policy says there is none, or the fallback does.
            PolicyError: The fallback failed too, or the policy will not have one.
        """
        if not self._hangs:
            try:
                return await self._ask(self.policy, candidates, request, view)
            except PolicyError as exc:
                if not self.policy.stand_in:
                    raise
                fallback = type(self._fallback).__name__
                level = logging.DEBUG if str(exc) == self._said else logging.WARNING  # not for every attempt
                logger.log(level, "%s; the policy %s chooses instead", exc, fallback)
                self._said = str(exc)
        elif not self.policy.stand_in:
            raise PolicyError(
                f"policy {type(self.policy).__name__} took too long before, and there is no fallback for it"
            )
        return await self._ask(self._fallback, candidates, request, view)

    def tell(self, route: Route, outcome: RouteOutcome) -> None:
        """Have the policy told how a route fared, soon."""
        if not self._listens:
            return
        try:
            self._untold.send_nowait((route, outcome))
        except (trio.WouldBlock, trio.ClosedResourceError, trio.BrokenResourceError):
            logger.debug("policy.untold route=%s", route)

    async def deliver_outcomes(self) -> None:
        """Tell the policy what happens, until `finish`. A task of whoever owns this."""
        try:
            async for route, outcome in self._outcomes:
                if self._hangs:
                    continue
                try:
                    with trio.fail_after(self._timeout_s):
                        await trio.to_thread.run_sync(
                            tell_policy, self.policy, route, outcome, abandon_on_cancel=True
                        )
                except PolicyError as exc:  # the user's code; the text must not suffer from it
                    logger.warning("%s", exc)
                except trio.TooSlowError:
                    self._hangs = True
                    logger.warning("%s", self._too_slow(self.policy, "on_result"))
        finally:
            self._all_told.set()

    async def finish(self) -> None:
        """Wait until everything is told, for as long as the policy may think."""
        self._untold.close()
        with trio.move_on_after(self._timeout_s):
            await self._all_told.wait()

    async def _ask(
        self,
        policy: RoutingPolicy,
        candidates: Sequence[Candidate],
        request: RouteRequest,
        view: ReputationView,
    ) -> list[Route]:
        is_ours = type(policy).__module__ == RoutingPolicy.__module__
        try:
            with trio.fail_after(math.inf if is_ours else self._timeout_s):
                return await trio.to_thread.run_sync(
                    ask_policy, policy, candidates, request, view, abandon_on_cancel=True
                )
        except trio.TooSlowError as exc:
            self._hangs = True
            raise PolicyError(self._too_slow(policy, "choose_routes")) from exc

    def _too_slow(self, policy: RoutingPolicy, method: str) -> str:
        return (
            f"policy {type(policy).__name__}: {method} took longer than {self._timeout_s:g} s"
            " (client.policy_timeout_s); it is asked no more"
        )
