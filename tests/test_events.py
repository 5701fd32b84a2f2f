"""What a client tells whoever follows it."""

from __future__ import annotations

import msgspec
import pytest

from p2pinfer.events import (
    AuditDone,
    Event,
    HopFailed,
    HopReplaced,
    SessionEnded,
    SessionStarted,
    StepDone,
)

from .audit.audited_swarm import PROMPT, OpenClient, open_client, swarm, text_of
from .node.memory_swarm import MemorySwarm

__all__ = ["open_client", "swarm"]  # fixtures


async def test_a_generation_can_be_followed_from_its_route_to_its_audits(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    events: list[Event] = []
    await swarm.serve("a", 0, 4)
    await swarm.serve("b", 4, 8)
    async with open_client(on_event=events.append) as client:
        await text_of(client.generate(PROMPT, max_new_tokens=12))
        await client.audits_settled()
    started, *rest = events
    assert isinstance(started, SessionStarted)
    assert [(hop.peer_id, hop.blocks, hop.connection) for hop in started.route] == [
        ("a", (0, 4), "direct"),
        ("b", (4, 8), "direct"),
    ]
    steps = [event for event in rest if isinstance(event, StepDone)]
    assert [event.position for event in steps] == [*range(5, 16)]  # the first token comes of the prefill
    assert all(len(event.per_hop_ms) == 2 and 0 < max(event.per_hop_ms) <= event.ms for event in steps)
    [ended] = [event for event in rest if isinstance(event, SessionEnded)]
    assert (ended.session, ended.reason, ended.failovers) == (started.session, "closed", 0)
    audits = [event for event in rest if isinstance(event, AuditDone)]
    assert {event.peer_id: event.verdict for event in audits} == {"a": "pass", "b": "pass"}
    decoded = [msgspec.json.decode(msgspec.json.encode(event), type=Event) for event in events]
    assert decoded == events


async def test_a_hop_that_dies_is_reported_and_so_is_its_replacement(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    events: list[Event] = []
    await swarm.serve("a", 0, 4)
    await swarm.serve("b", 4, 8, tokens_per_s=1e5)
    await swarm.serve("c", 4, 8, tokens_per_s=1)
    async with open_client(on_event=events.append) as client:
        generation = client.generate(PROMPT, max_new_tokens=12)
        for _ in range(4):
            await anext(generation)
        await swarm.network.kill("b")
        await text_of(generation)
    [failed] = [event for event in events if isinstance(event, HopFailed)]
    assert failed.peer_id == "b"
    [replaced] = [event for event in events if isinstance(event, HopReplaced)]
    assert (replaced.replaced, replaced.cause) == (("b",), "failure")
    assert [hop.peer_id for hop in replaced.route] == ["a", "c"]


async def test_a_listener_that_raises_harms_no_generation(
    swarm: MemorySwarm, open_client: OpenClient, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: Event) -> None:
        raise KeyError(event)

    await swarm.serve("a", 0, 8)
    async with open_client(on_event=fail) as client:
        text = await text_of(client.generate(PROMPT, max_new_tokens=4))
    assert text
    assert "a listener failed on StepDone" in caplog.text
    caplog.clear()
