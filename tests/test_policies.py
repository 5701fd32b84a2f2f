"""The policies of docs/policies.md do what the document says, and so does the runner that asks them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from p2pinfer.errors import NoRoute, PolicyError
from p2pinfer.models.span import BlockSpan
from p2pinfer.planning.policy_runner import PolicyRunner
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.verdict import Verdict
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.coordinates import Coordinate
from p2pinfer.routing.policy import RiskAdjusted, RoutingPolicy, ask_policy, load_policy
from p2pinfer.routing.route import Candidate, Route, RouteOutcome, RouteRequest

DOCUMENT = (Path(__file__).parent.parent / "docs" / "policies.md").read_text(encoding="utf-8")
REVISION = "ab" * 16
HERE = Coordinate(0.0, 0.0, 0.0, 1.0, 0.1)
REQUEST = RouteRequest(REVISION, num_blocks=8, hidden_bytes_per_token=640, tokens=100, coordinate=HERE)
Ask = Callable[..., list[tuple[str, ...]]]


def candidate(
    peer_id: str,
    start: int = 0,
    stop: int = 8,
    *,
    rtt_ms: float | None = None,
    tokens_per_s: float = 20.0,
    x_ms: float | None = None,
    free: int = 1 << 20,
) -> Candidate:
    said = Announcement(
        *(peer_id, "m", REVISION, BlockSpan(start, stop), "float32", tokens_per_s, free, 1),
        coordinate=None if x_ms is None else Coordinate(x_ms, 0.0, 0.0, 1.0, 0.1),
    )
    return Candidate(said, rtt_ms)


def ledger(**passes: int) -> Ledger:
    """Of each peer, how many audits it has passed."""
    known = Ledger()
    for peer_id, count in passes.items():
        for _ in range(count):
            known.record_audit(peer_id, Verdict.PASS, 1.0)
    return known


@pytest.fixture
def policy(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RoutingPolicy]:
    """The policy of the name that the test is parametrised with, as a reader would save it."""
    (source,) = re.findall(rf"^```python {request.param}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    module = f"written_{request.param}"  # not my_policy: the README's has that name
    (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
    yield load_policy(f"{module}:{request.param}", tmp_path)
    del sys.modules[module]


def routes(policy: RoutingPolicy, peers: list[Candidate], view: Ledger, **fields: object) -> list[list[str]]:
    found = ask_policy(policy, peers, replace(REQUEST, **fields), view)  # type: ignore[arg-type]
    return [list(route.peer_ids) for route in found]


def test_every_policy_in_the_document_is_tested() -> None:
    assert re.findall(r"^```python (\w+)$", DOCUMENT, re.MULTILINE) == [
        "NearFirst",
        "KnownFirst",
        "SoundAndFast",
    ]


@pytest.mark.parametrize("policy", ["NearFirst"], indirect=True)
def test_a_region_comes_first_and_everybody_else_after_it(policy: RoutingPolicy) -> None:
    far = candidate("far", rtt_ms=45.0, tokens_per_s=1e4)  # the fastest all the same
    near, predicted = candidate("near", rtt_ms=20.0), candidate("predicted", x_ms=25.0)
    assert routes(policy, [far, near], Ledger()) == [["near"], ["far"]]
    assert routes(policy, [far, predicted], Ledger())[0] == ["predicted"]
    half, unknown = candidate("half", 0, 4, rtt_ms=10.0), candidate("unknown")
    assert routes(policy, [half, far], Ledger()) == [["far"]]
    assert routes(policy, [half, unknown], Ledger())[0][-1] == "unknown"


@pytest.mark.parametrize("policy", ["KnownFirst"], indirect=True)
def test_the_first_block_goes_to_nobody_unknown(policy: RoutingPolicy) -> None:
    view = ledger(known=10, slow=10)
    fast = candidate("stranger", tokens_per_s=1e4)
    known, slow = candidate("known", 0, 2), candidate("slow", 0, 2, tokens_per_s=5.0)
    assert routes(policy, [fast, known, slow], view) == [["known", "stranger"], ["slow", "stranger"]]
    assert routes(policy, [fast, candidate("known")], view) == [["known"]]
    assert routes(policy, [fast, known, slow], view, excluded=frozenset({"known"})) == [["slow", "stranger"]]
    with pytest.raises(NoRoute, match="nobody who is known"):
        routes(policy, [fast, candidate("known", 2, 8)], view)
    with pytest.raises(NoRoute, match="nobody who is known"):
        routes(policy, [candidate("stranger", 0, 4), candidate("known", 0, 2)], view)


@pytest.mark.parametrize("policy", ["KnownFirst"], indirect=True)
def test_in_a_failover_the_first_block_stays_known_and_later_ones_go_to_anybody(
    policy: RoutingPolicy,
) -> None:
    view, fast = ledger(known=10), candidate("stranger", tokens_per_s=1e4)
    known = candidate("known")
    later = routes(
        policy, [fast, known], view, span=BlockSpan(2, 6), source=known, excluded=frozenset({"known"})
    )
    assert later == [["stranger"]]
    assert routes(policy, [fast, known], view, span=BlockSpan(0, 2), sink=fast) == [["known"]]


@pytest.mark.parametrize("policy", ["SoundAndFast"], indirect=True)
def test_the_floor_on_integrity_is_lowered_step_by_step_and_speed_decides_above_it(
    policy: RoutingPolicy,
) -> None:
    fast, sound, sounder = (
        candidate(peer_id, tokens_per_s=speed)
        for peer_id, speed in (("fast", 1e4), ("sound", 40.0), ("sounder", 20.0))
    )
    assert routes(policy, [fast, sound, sounder], ledger(sound=10, sounder=40))[0] == ["sounder"]
    assert routes(policy, [fast, sound, sounder], ledger(sound=30, sounder=40))[0] == ["sound"]
    assert routes(policy, [fast, sound], ledger(sound=10))[0] == ["sound"]
    assert routes(policy, [fast, sound], ledger(sound=4, fast=5))[0] == ["fast"]
    with pytest.raises(NoRoute, match=r"integrity is below 0\.50"):
        routes(policy, [fast, sound], ledger(sound=1))


def test_integrity_is_what_the_document_says() -> None:
    assert [f"{ledger(p=passes).score('p').integrity:.2f}" for passes in (1, 5, 10, 28)] == [
        "0.22",
        "0.61",
        "0.76",
        "0.90",
    ]


class Broken(RoutingPolicy):
    def choose_routes(self, candidates: object, request: object, view: object) -> list[Route]:
        raise ValueError("a slip")


class Unreplaced(Broken):
    stand_in = False


class Hanging(RoutingPolicy):
    stand_in = False

    def choose_routes(self, candidates: object, request: object, view: object) -> list[Route]:
        trio.from_thread.run(trio.sleep, 1e6)
        return []


async def test_the_default_stands_in_unless_the_policy_forbids_it(caplog: pytest.LogCaptureFixture) -> None:
    peers, view = [candidate("a")], Ledger()
    policy_runner = PolicyRunner(Broken(), RiskAdjusted(), 5.0)
    assert [route.peer_ids for route in await policy_runner.choose_routes(peers, REQUEST, view)] == [("a",)]
    assert "policy Broken raised ValueError: a slip; the policy RiskAdjusted chooses" in caplog.text
    caplog.clear()
    await policy_runner.choose_routes(peers, REQUEST, view)
    assert not caplog.records, "it was said before"
    policy_runner = PolicyRunner(Unreplaced(), RiskAdjusted(), 5.0)
    for _ in range(2):
        with pytest.raises(PolicyError, match="policy Unreplaced raised ValueError: a slip"):
            await policy_runner.choose_routes(peers, REQUEST, view)


async def test_nothing_stands_in_for_a_policy_that_hung_if_it_forbids_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    policy_runner = PolicyRunner(Hanging(), RiskAdjusted(), 5.0)
    with pytest.raises(PolicyError, match="took longer than 5 s"):
        await policy_runner.choose_routes([candidate("a")], REQUEST, Ledger())
    with pytest.raises(PolicyError, match="took too long before, and there is no fallback for it"):
        await policy_runner.choose_routes([candidate("a")], REQUEST, Ledger())
    # It does not listen, and nothing happens.
    policy_runner.tell(Route((candidate("a").hop(),)), RouteOutcome(ok=True))
