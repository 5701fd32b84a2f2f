"""Second opinions: sessions that look like those of clients."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import replace

import pytest

from p2pinfer.audit import second_opinion
from p2pinfer.node.events import SessionOpened
from p2pinfer.node.host.host import Host
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.protocol.messages import SESSION_PROTOCOL
from p2pinfer.node.transport.identity import Identity

from ..node.memory_swarm import MemorySwarm
from .audited_swarm import PROMPT, OpenClient, cheat, noisy, open_client, swarm, text_of

__all__ = ["open_client", "swarm"]  # fixtures


async def test_a_second_opinion_on_an_inner_span_looks_like_a_session(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    """Its outputs go on to who serves the blocks after it, and only the last ones of a prompt come back."""
    await swarm.serve("a", 0, 3)
    cheat(await swarm.serve("b", 3, 5, tokens_per_s=1e5), noisy)
    await swarm.serve("b2", 3, 5, tokens_per_s=1)
    await swarm.serve("c", 5, 8)
    async with open_client() as client:
        await text_of(client.generate(PROMPT, max_new_tokens=24))
        await client.audits_settled()
        assert client.ledger.is_banned("b")
        assert not client.ledger.is_banned("b2")
    chains = [(source, target) for source, target, _ in swarm.network.streams]
    assert ("b2", "c") in chains
    opened = [each for each in swarm.events if isinstance(each, SessionOpened) and each.blocks == (3, 5)]
    asked = {each.max_tokens for each in opened if each.peer_id != client.member.peer_id}
    assert min(asked) > 128  # as a generation reserves


async def test_a_second_opinion_does_without_successors_that_fail(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    await swarm.serve("a", 0, 3)
    cheat(await swarm.serve("b", 3, 5, tokens_per_s=1e5), noisy)
    await swarm.serve("b2", 3, 5, tokens_per_s=1)
    await swarm.serve("c", 5, 8)
    async with open_client() as client:
        await text_of(client.generate(PROMPT, max_new_tokens=24))
        swarm.network.hosts["c"].handlers.pop(SESSION_PROTOCOL)
        await client.audits_settled()
        assert client.ledger.is_banned("b")
        assert "b2" in {target for _, target, _ in swarm.network.streams}


async def test_a_second_opinion_tells_nobody_whose_it_is(
    swarm: MemorySwarm, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Addresses that lead to the asking node are not said under the identity that is thrown away."""
    await swarm.serve("a", 0, 8)
    cheat(await swarm.serve("b", 0, 8, tokens_per_s=1e5), noisy)
    configs: list[HostConfig] = []
    open_host = vars(second_opinion)["open_host"]

    def note(identity: Identity, config: HostConfig) -> AbstractAsyncContextManager[Host]:
        configs.append(config)
        opened: AbstractAsyncContextManager[Host] = open_host(identity, config)
        return opened

    monkeypatch.setattr(second_opinion, "open_host", note)
    announced = HostConfig(announce=("/ip4/203.0.113.7/tcp/14001",))
    async with open_client(host_config=announced) as client:
        await text_of(client.generate(PROMPT, max_new_tokens=16))
        await client.audits_settled()
        assert client.ledger.is_banned("b")
    assert configs == [replace(announced, listen=(), announce=())]
