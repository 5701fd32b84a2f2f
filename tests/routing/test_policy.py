import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from p2pinfer.errors import NoRoute, PolicyError
from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.verdict import Verdict
from p2pinfer.reputation.view import ReputationView
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.config import RoutingConfig
from p2pinfer.routing.planner import cheapest_routes
from p2pinfer.routing.policy import (
    BUILT_IN_POLICIES,
    DEFAULT_POLICY,
    MAX_ROUTES,
    Fastest,
    RiskAdjusted,
    RoutingPolicy,
    Spread,
    TrustedOnly,
    ask_policy,
    load_policy,
    tell_policy,
)
from p2pinfer.routing.route import Candidate, Route, RouteOutcome, RouteRequest

REVISION = "a" * 32
REQUEST = RouteRequest(REVISION, num_blocks=8, hidden_bytes_per_token=64, tokens=100)
OUTCOME = RouteOutcome(ok=True, tokens=3, seconds=1.0)


def candidate(peer_id: str, start: int = 0, stop: int = 8, tokens_per_s: float = 10.0) -> Candidate:
    return Candidate(
        Announcement(peer_id, "m", REVISION, BlockSpan(start, stop), "float32", tokens_per_s, 100, 1)
    )


CANDIDATES = [
    candidate("a"),
    candidate("b", tokens_per_s=12.0),
    candidate("left", 0, 4),
    candidate("right", 4, 8),
]


@pytest.fixture
def module_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for modules; what they leave behind in the interpreter goes with it."""
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("name", BUILT_IN_POLICIES)
def test_every_built_in_policy_loads_and_returns_routes_that_can_be_walked(name: str) -> None:
    ledger = Ledger(vouched=[peer.peer_id for peer in CANDIDATES])
    routes = ask_policy(load_policy(name), CANDIDATES, REQUEST, ledger)
    assert 1 <= len(routes) == len(set(routes))


@pytest.mark.parametrize("name", BUILT_IN_POLICIES)
def test_every_built_in_policy_says_which_blocks_are_missing(name: str) -> None:
    with pytest.raises(NoRoute) as caught:
        ask_policy(load_policy(name), [candidate("left", 0, 4)], REQUEST, Ledger(vouched=["left"]))
    assert caught.value.missing == ((4, 8),)


@pytest.mark.parametrize("name", BUILT_IN_POLICIES)
def test_no_built_in_policy_uses_a_banned_or_excluded_peer(name: str) -> None:
    ledger = Ledger(banned=["b"], vouched=["a", "left", "right"])
    request = RouteRequest(REVISION, 8, 64, tokens=100, excluded=frozenset({"left"}))
    policy = load_policy(name)
    for _ in range(10):
        routes = ask_policy(policy, CANDIDATES, request, ledger)
        assert {route.peer_ids for route in routes} & {("a",), ("a", "right")}
        assert {route.peer_ids for route in routes} <= {("a",), ("a", "right")}


def test_the_default_weighs_risk_and_the_fastest_does_not() -> None:
    ledger = Ledger()
    for _ in range(20):
        ledger.record_failure("b", 0.0)
    assert type(load_policy(DEFAULT_POLICY)) is RiskAdjusted
    assert RiskAdjusted(rng=random.Random(0)).choose_routes(CANDIDATES, REQUEST, ledger)[0].peer_ids == ("a",)
    assert Fastest().choose_routes(CANDIDATES, REQUEST, ledger)[0].peer_ids == ("b",)


def test_who_was_outvoted_is_used_only_where_nobody_else_is() -> None:
    """However fast it is; and where nobody else serves its blocks a text still comes."""
    ledger, quick = Ledger(), candidate("quick", tokens_per_s=1e4)
    for _ in range(4):
        ledger.record_audit("quick", Verdict.PASS, 0.0)
    policy = RiskAdjusted(RoutingConfig(explore_share=0.0, probation_share=0.0), rng=random.Random(0))
    assert policy.choose_routes([quick, *CANDIDATES], REQUEST, ledger)[0].peer_ids == ("quick",)
    ledger.record_audit("quick", Verdict.SUSPECT, 0.0, contradicted=True)
    assert policy.choose_routes([quick, *CANDIDATES], REQUEST, ledger)[0].peer_ids != ("quick",)
    assert policy.choose_routes([quick], REQUEST, ledger)[0].peer_ids == ("quick",)


def test_spread_uses_peers_as_often_as_they_have_capacity() -> None:
    peers = [candidate("small", tokens_per_s=10.0), candidate("large", tokens_per_s=30.0)]
    policy = Spread(random.Random(3))
    firsts = Counter(policy.choose_routes(peers, REQUEST, Ledger())[0].peer_ids for _ in range(2000))
    assert 0.70 < firsts["large",] / 2000 < 0.80


def test_spread_is_the_same_for_the_same_seed_and_stops_where_it_was_asked_to() -> None:
    request = RouteRequest(REVISION, 8, 64, tokens=100, span=BlockSpan(2, 6))
    first, second = (Spread(random.Random(5)).choose_routes(CANDIDATES, request, Ledger()) for _ in range(2))
    assert first == second
    assert {(route.hops[0].span.start, route.hops[-1].span.stop) for route in first} == {(2, 6)}


def test_trusted_only_refuses_strangers_and_says_so() -> None:
    with pytest.raises(NoRoute, match=r"integrity is below 0\.60") as caught:
        TrustedOnly().choose_routes(CANDIDATES, REQUEST, Ledger())
    assert caught.value.missing == ()
    ledger = Ledger(vouched=["left", "right"])
    assert [route.peer_ids for route in TrustedOnly().choose_routes(CANDIDATES, REQUEST, ledger)] == [
        ("left", "right")
    ]
    assert len(TrustedOnly(min_integrity=0.05).choose_routes(CANDIDATES, REQUEST, Ledger())) == 3


class PreferLeft(RoutingPolicy):
    """What a user writes: a rule of one's own, the rest left to the planner."""

    def __init__(self) -> None:
        self.told: list[RouteOutcome] = []

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        liked = [peer for peer in candidates if peer.peer_id in ("left", "right")]
        return cheapest_routes(liked or candidates, request, view)

    def on_result(self, route: Route, outcome: RouteOutcome) -> None:
        self.told.append(outcome)


def test_a_policy_of_ones_own_decides_and_hears_how_it_went() -> None:
    policy = PreferLeft()
    routes = ask_policy(policy, CANDIDATES, REQUEST, Ledger())
    assert [route.peer_ids for route in routes] == [("left", "right")]
    tell_policy(policy, routes[0], OUTCOME)
    assert policy.told == [OUTCOME]


def test_a_policy_need_not_listen() -> None:
    route = Fastest().choose_routes(CANDIDATES, REQUEST, Ledger())[0]
    tell_policy(Fastest(), route, OUTCOME)


class Returns(RoutingPolicy):
    """Returns what it is told to, whatever the types say; raises it if it is an exception."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[no-any-return]  # nonsense on purpose

    def on_result(self, route: Route, outcome: RouteOutcome) -> None:
        raise RuntimeError("cannot listen")


WHOLE = Route((candidate("a").hop(),))


def endless() -> Iterator[Route]:
    while True:
        yield WHOLE


def broken() -> Iterator[Route]:
    yield WHOLE
    raise KeyError("second")


async def forgotten_await() -> list[Route]:
    return [WHOLE]


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (None, "it returned NoneType; return a list of routes"),
        (WHOLE, "it returned one Route; return a list of routes"),
        ([], "no route"),
        (["a"], "'a' instead of a Route"),
        (ValueError("two\nlines"), "Returns raised ValueError: two lines"),
        (PolicyError("out of luck"), "Returns: out of luck"),
    ],
)
def test_a_policy_that_raises_or_returns_nonsense_is_contained(answer: object, complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint):
        ask_policy(Returns(answer), CANDIDATES, REQUEST, Ledger())


def test_a_generator_is_read_so_far_and_no_further() -> None:
    assert ask_policy(Returns(endless()), CANDIDATES, REQUEST, Ledger()) == [WHOLE] * MAX_ROUTES
    with pytest.raises(PolicyError, match="KeyError"):
        ask_policy(Returns(broken()), CANDIDATES, REQUEST, Ledger())


def test_an_async_policy_is_told_not_to_be() -> None:
    with pytest.raises(PolicyError, match="async"):
        ask_policy(Returns(forgotten_await()), CANDIDATES, REQUEST, Ledger())


def test_a_policy_that_says_there_is_no_route_is_believed() -> None:
    with pytest.raises(NoRoute, match="on strike"):
        ask_policy(Returns(NoRoute("on strike")), CANDIDATES, REQUEST, Ledger())


def test_a_policy_that_fails_to_listen_is_contained() -> None:
    with pytest.raises(PolicyError, match="Returns raised RuntimeError: cannot listen"):
        tell_policy(Returns([]), WHOLE, OUTCOME)


def test_a_policy_cannot_change_what_its_answer_is_checked_against() -> None:
    class Meddler(RoutingPolicy):
        def choose_routes(
            self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
        ) -> Sequence[Route]:
            assert isinstance(candidates, list)
            candidates.append(candidate("invented"))
            return [Route((candidate("invented").hop(),))]

    with pytest.raises(PolicyError, match="not a candidate"):
        ask_policy(Meddler(), CANDIDATES, REQUEST, Ledger())


MINE = """
from p2pinfer.routing.policy import Fastest

class Mine(Fastest):
    pass

class NeedsArguments(Fastest):
    def __init__(self, region):
        pass

class Stranger:
    pass

thing = 3
"""


def test_a_policy_is_loaded_from_a_module_in_the_folder(module_folder: Path) -> None:
    (module_folder / "mine_policy.py").write_text(MINE)
    policy = load_policy("mine_policy:Mine", module_folder)
    assert type(policy).__name__ == "Mine"


def test_a_policy_is_looked_for_in_the_current_folder(
    module_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = module_folder / "my_pack"
    package.mkdir()
    (package / "policies.py").write_text(MINE)
    monkeypatch.chdir(module_folder)
    assert isinstance(load_policy("my_pack.policies:Mine"), Fastest)


def test_a_policy_is_loaded_from_an_installed_module() -> None:
    assert isinstance(load_policy("p2pinfer.routing.policy:Spread"), Spread)


@pytest.mark.parametrize(
    ("source", "name", "complaint"),
    [
        (MINE, "faster", "'faster' is no routing policy"),
        (MINE, ":", "':' is no routing policy"),
        (MINE, ".mine:Mine", "is no routing policy"),
        (MINE, "absent_policy:Mine", "there is no module absent_policy"),
        (MINE, "bad_policy.inner:Mine", "there is no module bad_policy.inner"),
        (MINE, "bad_policy:Yours", "module bad_policy has no Yours"),
        (MINE, "bad_policy:thing", "thing is no subclass"),
        (MINE, "bad_policy:Stranger", "Stranger is no subclass"),
        (MINE, "bad_policy:NeedsArguments", "NeedsArguments.. raised TypeError"),
        (MINE, "p2pinfer.routing.policy:RoutingPolicy", "RoutingPolicy.. raised TypeError"),
        (
            "import absent_dependency",
            "bad_policy:Mine",
            "cannot be loaded: ModuleNotFoundError: .*absent_dependency",
        ),
        ("def (", "bad_policy:Mine", "cannot be loaded: SyntaxError"),
        ("1 / 0", "bad_policy:Mine", "cannot be loaded: ZeroDivisionError"),
        ("raise SystemExit(3)", "bad_policy:Mine", "cannot be loaded: SystemExit: 3"),
        ("import sys; sys.path.clear()\n" + MINE, "bad_policy:Yours", "has no Yours"),
    ],
)
def test_a_policy_that_cannot_be_loaded_is_one_clear_line(
    module_folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str, complaint: str
) -> None:
    (module_folder / "bad_policy.py").write_text(source)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        with pytest.raises(PolicyError, match=complaint) as caught:
            load_policy(name, module_folder)
    message = str(caught.value)
    assert "\n" not in message
    assert all(built_in in message for built_in in BUILT_IN_POLICIES)
