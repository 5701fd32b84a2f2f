"""Who is let in, how many streams each may open, and what is said to the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from p2pinfer.errors import ConfigError
from p2pinfer.node.gate import GATED, MAX_REMEMBERED, RATE_LIMITED, RESOURCE_LIMIT_EXCEEDED, Gate, reason
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.identity import new_identity

ANNA, BEN, EVE = (new_identity().peer_id for _ in range(3))


def test_without_lists_everybody_is_let_in() -> None:
    gate = Gate(HostConfig())
    assert gate.admits(ANNA)
    assert gate.lets_in(ANNA)


def test_an_allow_list_lets_in_nobody_else_and_a_deny_list_has_the_last_word() -> None:
    refused: list[str] = []
    gate = Gate(HostConfig(allow=(ANNA, BEN), deny=(BEN,)), refused.append)
    assert [gate.lets_in(peer) for peer in (ANNA, BEN, EVE)] == [True, False, False]
    assert refused == ["gated", "gated"]


def test_lists_may_be_in_files(tmp_path: Path) -> None:
    listed = tmp_path / "friends"
    listed.write_text(f"# friends\n{ANNA}  # of mine\n\n  {BEN}\n")
    gate = Gate(HostConfig(allow=(str(listed), EVE)))
    assert gate.admits(ANNA)
    assert gate.admits(BEN)
    assert gate.admits(EVE)
    assert not gate.admits(new_identity().peer_id)


def test_an_empty_file_allows_nobody(tmp_path: Path) -> None:
    listed = tmp_path / "friends"
    listed.touch()
    assert not Gate(HostConfig(allow=(str(listed),))).admits(ANNA)


def test_what_is_neither_an_id_nor_a_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nobody is neither a peer id nor a file"):
        Gate(HostConfig(deny=("nobody",)))
    listed = tmp_path / "friends"
    listed.write_text(f"{ANNA}\nbob\n")
    with pytest.raises(ConfigError, match=r"friends, line 2: 'bob' is not a peer id"):
        Gate(HostConfig(allow=(str(listed),)))


async def test_streams_are_limited_for_each_peer_and_for_all() -> None:
    refused: list[str] = []
    gate = Gate(HostConfig(max_streams=3, max_streams_per_peer=2), refused.append)
    assert [gate.take_stream(ANNA) for _ in range(3)] == [0, 0, RESOURCE_LIMIT_EXCEEDED]
    assert [gate.take_stream(BEN) for _ in range(2)] == [0, RESOURCE_LIMIT_EXCEEDED]
    assert gate.streams == 3
    gate.give_back(ANNA)
    assert gate.take_stream(BEN) == 0
    gate.give_back(BEN)
    gate.give_back(BEN)
    gate.give_back(ANNA)
    assert gate.streams == 0
    assert refused == ["streams", "streams"]


async def test_streams_a_second_are_limited_for_each_peer(autojump_clock: trio.testing.MockClock) -> None:
    refused: list[str] = []
    gate = Gate(HostConfig(streams_per_s=2, streams_at_once=3), refused.append)

    def knock(peer: str) -> int:
        code = gate.take_stream(peer)
        if not code:
            gate.give_back(peer)
        return code

    assert [knock(ANNA) for _ in range(4)] == [0, 0, 0, RATE_LIMITED]
    assert knock(BEN) == 0
    await trio.sleep(0.6)
    assert [knock(ANNA) for _ in range(2)] == [0, RATE_LIMITED]
    assert refused == ["rate", "rate"]


def test_who_turned_us_away_is_remembered_until_asked_and_not_without_end() -> None:
    gate = Gate(HostConfig())
    gate.note_turned_away(ANNA)
    assert gate.has_turned_us_away(ANNA)
    assert not gate.has_turned_us_away(ANNA)
    gate.note_turned_away(ANNA)
    for number in range(MAX_REMEMBERED):
        gate.note_turned_away(f"peer {number}")
    assert not gate.has_turned_us_away(ANNA)


def test_a_number_of_ours_has_a_reason_and_another_has_none() -> None:
    assert all(reason(code) for code in (GATED, RATE_LIMITED, RESOURCE_LIMIT_EXCEEDED))
    assert reason(0) == reason(12345) == ""
