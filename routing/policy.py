"""Routing policies: the built-in ones, and how a user's own is loaded and asked.

A policy is handed what is known and returns routes, best first. It may be anybody's code: what it raises
becomes a `PolicyError`, and what it returns is checked before a byte is sent by it. A policy that hangs is
not noticed here; the caller asks in a thread.
"""

from __future__ import annotations

import difflib
import importlib
import random
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import cast

from p2pinfer.errors import NoRoute, PolicyError
from p2pinfer.reputation.view import ReadOnlyView, ReputationView

from .check import check_routes
from .config import RoutingConfig
from .drawing import draw_routes
from .newcomers import plan_optimistically
from .planner import cheapest_routes
from .route import Candidate, Route, RouteOutcome, RouteRequest

DEFAULT_POLICY = "risk-adjusted"
MAX_ROUTES = 16  # more than anybody would try; also the end of an endless generator
_ALTERNATIVES = 3


class RoutingPolicy(ABC):
    """Chooses routes. Subclass it, and name the class as `module:Class` or hand over an instance.

    Attributes:
        stand_in: Whether the default policy answers when this one fails. Set it to False where a wrong way is
            worse than none: then the generation ends with what went wrong.
    """

    stand_in: bool = True

    @abstractmethod
    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        """Routes for the request, best first; the next one is tried when one cannot be set up.

        Called again for the part that is lost when a peer fails in the middle: `request.wanted` says which
        blocks, `request.excluded` who must not be used.

        Raises:
            NoRoute: There is none; `cheapest_routes` raises it with the reason.
        """

    def on_result(self, route: Route, outcome: RouteOutcome) -> None:  # noqa: B027 - there to be overridden
        """Learn how a session over `route` went. Does nothing unless overridden."""


class RiskAdjusted(RoutingPolicy):
    """The least expected time per token, with the chance of failure and of a lie priced in.

    Most sessions go by what peers that are known a little may be at best, a share of them by what anybody
    may, see `newcomers.py`; never in a failover, where a part of a route is wanted at once.
    """

    def __init__(
        self,
        config: RoutingConfig | None = None,
        *,
        rng: random.Random | None = None,
        alternatives: int = _ALTERNATIVES,
    ) -> None:
        self._config = config or RoutingConfig()
        self._rng = rng or random.Random()
        self._alternatives = alternatives

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        routes = cheapest_routes(candidates, request, view, self._config, self._alternatives)
        draw, config = self._rng.random(), self._config
        if request.span is None and draw < max(config.explore_share, config.probation_share):
            with suppress(NoRoute):
                strangers = draw < config.explore_share
                attempt = plan_optimistically(
                    candidates, request, view, config, self._rng, strangers=strangers
                )
                return list(dict.fromkeys([attempt, *routes]))
        return routes


class Fastest(RoutingPolicy):
    """The least time per token if everybody keeps their word; bans still hold."""

    def __init__(self, config: RoutingConfig | None = None) -> None:
        self._config = replace(config or RoutingConfig(), min_reliability=1.0, integrity_weight_s=0.0)

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        return cheapest_routes(candidates, request, view, self._config, _ALTERNATIVES)


class Spread(RoutingPolicy):
    """A random route, every peer as often as it has capacity: many sessions do not queue at one peer.

    Goes block by block. Of the peers that serve the next block one is drawn, by tokens per second and by
    the blocks it takes off the way, and is used to the end of its span. Integrity and reliability thin
    that out: among proven peers a newcomer has a twentieth of its chance, among newcomers all of it.
    """

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        def weigh(peer: Candidate, blocks: int) -> float:
            score = view.score(peer.peer_id)
            trust = max(score.reliability, 0.01) * max(score.integrity, 0.01)
            return peer.announcement.tokens_per_s * blocks * trust

        return draw_routes(candidates, request, view, weigh, self._rng, _ALTERNATIVES)


class TrustedOnly(RoutingPolicy):
    """Risk-adjusted, but only over peers whose integrity has been shown to be at least `min_integrity`.

    It never tries anybody out: another policy's sessions, or the user's word, must have shown it.
    """

    def __init__(self, min_integrity: float | None = None, config: RoutingConfig | None = None) -> None:
        self._config = config or RoutingConfig()
        self._min_integrity = self._config.trusted_integrity if min_integrity is None else min_integrity

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        floor = max(self._min_integrity, request.min_integrity)
        request = replace(request, min_integrity=floor)
        return cheapest_routes(candidates, request, view, self._config, _ALTERNATIVES)


BUILT_IN_POLICIES: dict[str, Callable[[RoutingConfig | None], RoutingPolicy]] = {
    "risk-adjusted": RiskAdjusted,
    "fastest": Fastest,
    "spread": lambda config: Spread(),  # it weighs nothing that could be set
    "trusted-only": lambda config: TrustedOnly(config=config),
}


def load_policy(
    name: str, folder: Path | None = None, *, config: RoutingConfig | None = None
) -> RoutingPolicy:
    """The policy called `name`: a built-in one, or `module:Class` of the user's.

    Args:
        folder: Where the module is looked for before the installed ones; by default the current folder.
        config: What a built-in policy weighs by.

    Raises:
        PolicyError: There is no such policy, or it cannot be made.
    """
    if name in BUILT_IN_POLICIES:
        return BUILT_IN_POLICIES[name](config)
    module, attribute = _split(name)
    found = getattr(_import(name, module, folder or Path.cwd()), attribute, None)
    if found is None:
        raise _unusable(name, f"is no routing policy: module {module} has no {attribute}")
    if not (isinstance(found, type) and issubclass(found, RoutingPolicy)):
        raise _unusable(name, f"is no routing policy: {attribute} is no subclass of p2pinfer.RoutingPolicy")
    try:
        return found()
    except (Exception, SystemExit) as exc:
        raise _unusable(name, f"cannot be made: {found.__name__}() raised {_summary(exc)}") from exc


def check_policy_name(name: str) -> None:
    """Nothing, if there may be a policy of this name. A user's module is not imported, which takes seconds.

    Raises:
        PolicyError: It is neither built in nor of the form `module:Class`.
    """
    if name not in BUILT_IN_POLICIES:
        _split(name)


def ask_policy(
    policy: RoutingPolicy, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
) -> list[Route]:
    """The policy's routes, best first, each of which can be walked as far as is known.

    Raises:
        NoRoute: The policy says there is none.
        PolicyError: The policy raised anything else, or returned something that is no route.
    """
    try:
        routes = _as_list(policy.choose_routes(list(candidates), request, ReadOnlyView(view)))
        check_routes(routes, request, candidates, view)
    except NoRoute:
        raise
    except PolicyError as exc:
        raise PolicyError(f"policy {type(policy).__name__}: {exc}") from exc
    except Exception as exc:
        raise PolicyError(f"policy {type(policy).__name__} raised {_summary(exc)}") from exc
    return routes


def tell_policy(policy: RoutingPolicy, route: Route, outcome: RouteOutcome) -> None:
    """Report to the policy how a session went.

    Raises:
        PolicyError: The policy raised; the session it was told of is not affected.
    """
    try:
        policy.on_result(route, outcome)
    except Exception as exc:
        raise PolicyError(f"policy {type(policy).__name__} raised {_summary(exc)}") from exc


def _split(name: str) -> tuple[str, str]:
    """Module and class of the user's."""
    match = re.fullmatch(r"(\w+(?:\.\w+)*):(\w+)", name)
    if match is not None:
        return match[1], match[2]
    nearest = difflib.get_close_matches(name, BUILT_IN_POLICIES, n=1)
    raise _unusable(name, f"is no routing policy{f', did you mean {nearest[0]}?' if nearest else ''}")


def _as_list(answer: object) -> list[Route]:
    if isinstance(answer, Route):
        raise PolicyError("it returned one Route; return a list of routes, best first")
    if isinstance(answer, Coroutine):
        answer.close()
        raise PolicyError("its choose_routes is async; write it without")
    if not isinstance(answer, Iterable):
        raise PolicyError(f"it returned {type(answer).__name__}; return a list of routes, best first")
    return list(islice(cast(Iterable[Route], answer), MAX_ROUTES))


def _import(name: str, module: str, folder: Path) -> ModuleType:
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()  # the file may be younger than the last import from there
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (module == exc.name or module.startswith(f"{exc.name}.")):
            raise _unusable(name, f"is no routing policy: there is no module {module} in {folder}") from exc
        raise _unusable(name, f"cannot be loaded: {_summary(exc)}") from exc
    # Whatever a user's module does at its top level is that user's mistake, SystemExit included.
    except (Exception, SystemExit) as exc:
        raise _unusable(name, f"cannot be loaded: {_summary(exc)}") from exc
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))


def _unusable(name: str, problem: str) -> PolicyError:
    choices = ", ".join(BUILT_IN_POLICIES)
    return PolicyError(f"{name!r} {problem}; built in are {choices}, your own is written module:Class")


def _summary(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split())}"
