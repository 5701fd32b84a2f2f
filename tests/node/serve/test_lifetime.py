"""When a session ends, and what that stops."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pinfer.errors import PeerVanished, ProtocolViolation, WrongOutput
from p2pinfer.node.serve.lifetime import Lifetime, SessionRefusal


async def test_the_first_reason_to_end_counts_and_later_scopes_are_cancelled_too() -> None:
    lifetime = Lifetime()
    with lifetime.scope():
        lifetime.end(SessionRefusal("protocol", "first"))
        lifetime.end(SessionRefusal("busy", "second"))
        await trio.sleep_forever()
    with lifetime.scope():
        await trio.sleep_forever()
    assert str(lifetime.ended_by) == "first"


@pytest.mark.parametrize(
    "error, client_gone, code",
    [
        (SessionRefusal("leaving", "going"), None, "leaving"),
        (ProtocolViolation("no such frame", "b"), None, "protocol"),
        (WrongOutput("not finite", "b"), None, "wrong_input"),
        (PeerVanished("cut", "b"), "the client vanished", "no_session"),
        (PeerVanished("cut", "b"), None, None),  # a predecessor, which may be replaced
    ],
)
async def test_what_a_peer_does_wrong_ends_its_session(
    error: Exception, client_gone: str | None, code: str | None
) -> None:
    lifetime = Lifetime()
    with lifetime.guard(client_gone):
        raise error
    assert lifetime.is_over == (code is not None)
    assert (lifetime.ended_by.code if lifetime.ended_by else None) == code


async def test_what_we_do_wrong_is_not_taken_for_a_peers_fault() -> None:
    lifetime = Lifetime()
    with pytest.raises(ZeroDivisionError), lifetime.guard("the client vanished"):
        raise ZeroDivisionError
    assert not lifetime.is_over


async def test_a_session_that_is_used_does_not_end_and_an_idle_one_does(
    autojump_clock: trio.testing.MockClock,
) -> None:
    lifetime = Lifetime()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lifetime.end_when_idle, 10.0)
        for _ in range(5):
            await trio.sleep(9)
            lifetime.last_active = trio.current_time()
        assert not lifetime.is_over
        await trio.sleep(11)
    assert lifetime.ended_by is not None and lifetime.ended_by.code == "lease_expired"
