"""Peers that are left alone for a while."""

from __future__ import annotations

from p2pinfer.planning.cooldowns import MAX_REMEMBERED, Cooldowns


def test_a_peer_rests_for_the_pause_and_is_then_asked_again() -> None:
    cooldowns = Cooldowns(2.0)
    cooldowns.rest("a", 10.0)
    cooldowns.rest("b", 11.0)
    assert cooldowns.peers(11.5) == {"a", "b"}
    assert cooldowns.peers(12.0) == {"b"}
    cooldowns.rest("b", 12.5)
    assert cooldowns.peers(13.5) == {"b"}
    assert cooldowns.peers(14.5) == frozenset()


def test_the_first_of_too_many_is_forgotten() -> None:
    cooldowns = Cooldowns(100.0)
    for number in range(MAX_REMEMBERED + 1):
        cooldowns.rest(str(number), 0.0)
    assert len(cooldowns.peers(1.0)) == MAX_REMEMBERED
    assert "0" not in cooldowns.peers(1.0)
