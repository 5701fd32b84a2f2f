"""How often peers are audited, and within which budget: at whatever price, the bound holds."""

from __future__ import annotations

import random

import pytest

from p2pinfer.audit.draw import AHEAD, LEAST_RATE, MOST_AHEAD, ROUTINE_RATE, AuditBudget, AuditDraw
from p2pinfer.client_config import AuditConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.small_lies import Sample
from p2pinfer.reputation.verdict import Verdict
from p2pinfer.routing.route import Hop, Route

SHARE = AuditConfig().share
ROUTE = Route((Hop("a", BlockSpan(0, 3)), Hop("b", BlockSpan(3, 5)), Hop("c", BlockSpan(5, 8))))


class Client:
    """Sessions of one second's work a hop, and audits at a price."""

    def __init__(self, price_s: float, seed: int = 0, config: AuditConfig | None = None) -> None:
        self.ledger = Ledger()
        self.draw = AuditDraw(self.ledger, config or AuditConfig(), lambda: 1.0, random.Random(seed))
        self.price_s = price_s
        self.audits = self.hops = 0

    def has_session(self, route: Route = ROUTE) -> frozenset[str]:
        chosen = self.draw.toss(route)
        self.draw.budget.earn(len(route.hops))
        self.hops += len(route.hops)
        for peer_id in chosen:
            glanced = self.draw.is_glance(peer_id)
            self.draw.pay(peer_id, self.price_s * (1 / 3 if glanced else 1))
            self.draw.budget.count_audit()
            self.audits += 1
            self.ledger.record_audit(peer_id, Verdict.PASS, 1.0)
        return chosen


@pytest.mark.parametrize("price_s", [0.01, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("strangers", [False, True])
def test_what_is_spent_stays_within_the_share_and_what_goes_ahead(price_s: float, strangers: bool) -> None:
    """For known peers, and where every session goes over peers that were never met."""
    client = Client(price_s)
    for number in range(600):
        names = [f"{each}{number}" if strangers else each for each in "abc"]
        hops = zip(names, ROUTE.hops, strict=True)
        client.has_session(Route(tuple(Hop(name, hop.span) for name, hop in hops)))
    floor = 2 * LEAST_RATE * client.hops * price_s
    assert client.draw.budget.spent_s <= SHARE * client.hops + (AHEAD + 1) * price_s + floor
    assert client.audits >= AHEAD


def test_what_newcomers_have_taken_while_there_was_nobody_else_is_repaid() -> None:
    """Routine audits do not stop for it, and do not take all of their part beside it either."""
    client = Client(0.5)
    for number in range(400):
        client.has_session(Route(tuple(Hop(f"{hop.peer_id}{number}", hop.span) for hop in ROUTE.hops)))
    for each in "abc":
        for _ in range(30):
            client.ledger.record_audit(each, Verdict.PASS, 1.0)
    before = client.audits
    for _ in range(200):
        client.has_session()
        room = MOST_AHEAD * client.price_s + 2 * LEAST_RATE * client.hops * client.price_s
        assert client.draw.budget.spent_s <= 1.3 * SHARE * client.hops + room
    assert client.audits - before > 20


def test_the_cheaper_audits_are_the_more_of_them_there_are() -> None:
    rates: list[float] = []
    for price_s in (0.02, 0.2, 0.6):
        client = Client(price_s)
        for _ in range(200):
            client.has_session()
        before = client.audits
        for _ in range(800):
            client.has_session()
        rates.append((client.audits - before) / 2400)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(ROUTINE_RATE, rel=0.1)
    assert rates[1] == pytest.approx(SHARE / 0.08, rel=0.2)  # of 0.2 s, nine times in ten a third
    assert rates[2] < 0.1


def test_who_lies_in_a_fifth_of_its_sessions_is_found_in_a_hundred() -> None:
    """At what audits cost with a small model: 1 - (1 - 0.2 * 0.14)^100 is 94 %."""
    found: list[int] = []
    for seed in range(200):
        client, rng = Client(0.18, seed), random.Random(1000 + seed)
        for _ in range(20):
            client.has_session()
        sessions = 0
        while True:
            sessions += 1
            if "b" in client.has_session() and rng.random() < 0.2:
                break
        found.append(sessions)
    assert sum(each <= 100 for each in found) / len(found) > 0.9


def test_peers_that_are_always_doubtful_keep_nobody_else_from_being_audited() -> None:
    """One that deviates as far as is SUSPECT and no further has a whole audit asked for in every session."""
    client, audited = Client(0.5), 0

    def has_session() -> bool:
        chosen = client.has_session()
        for peer_id in chosen - {"b"}:
            client.ledger.record_audit(peer_id, Verdict.SUSPECT, 1.0)
        return "b" in chosen

    for _ in range(300):
        has_session()
    before = client.draw.budget.spent_s
    for _ in range(1500):
        assert client.draw.rate_of("b") in (LEAST_RATE, ROUTINE_RATE)
        audited += has_session()
    assert audited / 1500 > 0.06  # of half a budget, a sixth of a second each for most
    assert client.draw.budget.spent_s - before < 1.2 * SHARE * 3 * 1500


def test_a_budget_that_is_used_up_leaves_little_even_for_newcomers() -> None:
    client = Client(1.0)
    assert client.draw.rate_of("stranger") == 1.0
    for _ in range(AHEAD + 1):
        client.draw.pay("stranger", 1.0)
        client.draw.budget.count_audit()
    assert client.draw.rate_of("stranger") == LEAST_RATE
    client.ledger.record_audit("doubtful", Verdict.SUSPECT, 1.0)
    assert client.draw.rate_of("doubtful") == 1.0
    for _ in range(MOST_AHEAD - AHEAD):
        client.draw.pay("stranger", 1.0)
        client.draw.budget.count_audit()
    assert client.draw.rate_of("doubtful") == LEAST_RATE
    client.draw.budget.earn(4000.0)
    assert client.draw.rate_of("stranger") == 1.0


def test_who_is_asked_for_opinions_cannot_use_up_the_budget_by_what_it_says() -> None:
    """It keeps a client waiting for 14 s, says that it worked all the time, and others go unaudited."""
    client = Client(0.01)
    for _ in range(100):
        client.has_session()
    before = client.draw.budget.spent_s
    for _ in range(3):
        client.draw.pay_opinion("b", 14.0)
        client.draw.budget.pay_vote(14.0)
    session_s = len(ROUTE.hops) * 1.0
    assert client.draw.budget.spent_s - before == pytest.approx(3 * 2 * session_s)
    client.draw.pay_opinion("b", 0.5)
    assert client.draw.budget.spent_s - before == pytest.approx(3 * 2 * session_s + 0.5)
    first = Client(0.01)
    first.draw.pay_opinion("b", 14.0)  # nothing is known yet
    assert first.draw.budget.spent_s == 14.0


def test_the_loading_of_weights_does_not_keep_the_first_audits_from_being_done() -> None:
    budget = AuditBudget(SHARE)
    budget.pay(100.0, routine=False)
    for _ in range(AHEAD - 1):
        budget.count_audit()
        budget.pay(0.1, routine=False)
        assert budget.has_for_others(AHEAD)


def test_first_audits_and_those_of_doubtful_peers_measure() -> None:
    ledger = Ledger()
    draw = AuditDraw(ledger, AuditConfig(), lambda: 1.0, random.Random(0))

    def measured(peer_id: str) -> float:
        return sum(not draw.is_glance(peer_id) for _ in range(500)) / 500

    assert not draw.is_glance("peer")
    # Others that wait while the first one loads the weights are no first ones.
    assert measured("peer") == pytest.approx(0.1, abs=0.05)
    ledger.record_audit("peer", Verdict.PASS, 1.0)
    assert measured("peer") == pytest.approx(0.1, abs=0.05)
    ledger.record_audit("peer", Verdict.SUSPECT, 1.0)
    assert measured("peer") == 1.0
    for _ in range(9):
        ledger.record_audit("other", Verdict.PASS, 1.0)
    for _ in range(2):
        ledger.record_small_lies("other", Sample(32, 15, 0, 0), 1.0)
    assert measured("other") == 1.0


def test_a_rate_that_the_user_sets_is_kept_to_and_measures() -> None:
    draw = AuditDraw(Ledger(), AuditConfig(rate=0.5), lambda: 1.0, random.Random(0))
    for _ in range(AHEAD + 1):
        draw.pay("stranger", 1.0)
        draw.budget.count_audit()
    assert draw.rate_of("stranger") == 0.5
    assert not any(draw.is_glance("stranger") for _ in range(50))
