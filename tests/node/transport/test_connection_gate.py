"""Who is let in, how many streams each may open, and what is said to the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from p2pinfer.errors import ConfigError
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.transport.connection_gate import (
    GATED,
    MAX_REMEMBERED,
    RATE_LIMITED,
    RESOURCE_LIMIT_EXCEEDED,
    TOLD_AT_ONCE,
    Gate,
    reason,
)
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.node.transport.peer_lists import SCOPES

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


async def test_many_keys_of_one_address_range_leave_streams_to_others() -> None:
    gate = Gate(HostConfig(max_streams=1000, max_streams_per_peer=100))
    taken = {
        address_range: sum(
            gate.take_stream(f"{address_range} {number // 100}", address_range) == 0 for number in range(2000)
        )
        for address_range in ("11.0.0.0/24", "2a00::/48")
    }
    assert taken == {"11.0.0.0/24": 500, "2a00::/48": 250}
    assert gate.take_stream(ANNA, "12.0.0.0/24") == 0
    for number in range(500):
        gate.give_back(f"11.0.0.0/24 {number // 100}", "11.0.0.0/24")
    assert gate.streams == 251


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
    assert gate.take_turned_away(ANNA)
    assert not gate.take_turned_away(ANNA)
    gate.note_turned_away(ANNA)
    for number in range(MAX_REMEMBERED):
        gate.note_turned_away(f"peer {number}")
    assert not gate.take_turned_away(ANNA)


def test_a_number_of_ours_has_a_reason_and_another_has_none() -> None:
    assert all(reason(code) for code in (GATED, RATE_LIMITED, RESOURCE_LIMIT_EXCEEDED))
    assert reason(0) == reason(12345) == ""


def test_a_list_of_clients_shuts_out_no_node() -> None:
    gate = Gate(HostConfig(allow=(f"clients:{ANNA}",), deny=(f"relaying:{BEN}",)))
    assert [gate.admits(EVE, scope) for scope in SCOPES] == [False, True, True]
    assert [gate.admits(ANNA, scope) for scope in SCOPES] == [True, True, True]
    assert [gate.admits(BEN, scope) for scope in SCOPES] == [False, True, False]
    assert all(gate.lets_in(peer) for peer in (ANNA, BEN, EVE))
    assert gate.refuses(EVE, "clients") == "it is not on the allow list"
    assert gate.refuses(BEN, "relaying") == "it is on the deny list"
    assert gate.refuses(ANNA, "clients") == ""


def test_who_is_wanted_for_nothing_may_not_connect() -> None:
    gate = Gate(HostConfig(deny=tuple(f"{scope}:{EVE}" for scope in SCOPES)))
    assert not gate.admits(EVE)
    assert not gate.lets_in(EVE)


def test_refusals_are_told_once_a_minute_for_a_peer_and_a_few_for_all(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = Gate(HostConfig(allow=(ANNA,)))
    for _ in range(3):
        gate.lets_in(BEN)
        gate.refuses(BEN, "clients")
    (told,) = caplog.messages
    assert BEN in told
    assert "it is not on the allow list" in told
    for _ in range(50):
        gate.lets_in(new_identity().peer_id)
    assert len(caplog.messages) == TOLD_AT_ONCE


async def test_a_file_that_changes_counts_from_then_on_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed = tmp_path / "friends"
    listed.write_text(f"{ANNA}\n")
    gate = Gate(HostConfig(allow=(str(listed), BEN)))
    assert not await gate.look_at_files()
    assert (gate.admits(ANNA), gate.admits(EVE)) == (True, False)
    listed.write_text(f"{EVE} nodes\n# Anna has left\n")
    assert await gate.look_at_files()
    assert [gate.admits(peer) for peer in (ANNA, BEN, EVE)] == [False, True, True]
    assert not gate.admits(EVE, "clients")
    listed.write_text("eve\n")
    assert not await gate.look_at_files()
    listed.unlink()
    assert not await gate.look_at_files()
    assert not await gate.look_at_files()
    assert gate.admits(EVE)
    assert len(caplog.messages) == 2
    assert "'eve' is not a peer id; the previous lists stay in force" in caplog.messages[0]
    listed.write_text("")
    assert await gate.look_at_files()
    assert [gate.admits(peer) for peer in (ANNA, BEN, EVE)] == [False, True, False]


async def test_files_are_looked_at_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pinfer.node.transport.connection_gate.LOOK_S", 0.01)
    listed, changed = tmp_path / "friends", trio.Event()
    listed.write_text(f"{ANNA}\n")
    gate = Gate(HostConfig(deny=(str(listed),)))

    async def on_change() -> None:
        changed.set()
        await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(gate.follow_files, on_change)
        listed.write_text(f"{ANNA}\n{BEN}\n")
        with trio.fail_after(60):
            await changed.wait()
        assert not gate.admits(BEN)
        nursery.cancel_scope.cancel()
