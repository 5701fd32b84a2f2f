"""Hops that replace others in a session, of which nobody was to be checked when it opened."""

from __future__ import annotations

import pytest

from p2pinfer.audit.draw import AuditDraw
from p2pinfer.client_config import AuditConfig

from ..node.memory_swarm import MemorySwarm
from .audited_swarm import PROMPT, OpenClient, cheat, noisy, open_client, swarm, text_of

__all__ = ["open_client", "swarm"]  # fixtures


@pytest.mark.parametrize("lies", [False, True])
async def test_who_replaces_a_hop_has_a_coin_of_its_own_where_nobody_else_is_checked(
    swarm: MemorySwarm, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch, lies: bool
) -> None:
    def rate_of(_: AuditDraw, peer_id: str) -> float:
        return float(peer_id == "spare")

    monkeypatch.setattr(AuditDraw, "rate_of", rate_of)
    for name, start, stop in (("a", 0, 3), ("b", 3, 5), ("c", 5, 8)):
        await swarm.serve(name, start, stop)
    async with open_client(audit=AuditConfig(linger_s=60.0)) as client:
        generation = client.generate(PROMPT, max_new_tokens=32)
        for _ in range(4):
            await anext(generation)
        spare = await swarm.serve("spare", 3, 5)
        if lies:
            cheat(spare, noisy)
        await swarm.network.kill("b")
        await text_of(generation)
        await client.audits_settled()
        assert [hop.peer_id for hop in generation.result.route] == ["a", "spare", "c"]
        assert client.audits.done == 1
        assert client.ledger.is_banned("spare") == lies
        assert client.ledger.account("spare").passed == (not lies)
