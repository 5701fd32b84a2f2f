"""Peers that are banned while texts go on over them."""

from __future__ import annotations

from p2pinfer.client_config import AuditConfig
from p2pinfer.session.receipt_checks import CHECK_EVERY

from ..node.memory_swarm import MemorySwarm
from .audited_swarm import PROMPT, OpenClient, cheat, noisy, open_client, swarm, text_of

__all__ = ["open_client", "swarm"]  # fixtures


async def test_a_text_goes_on_without_a_hop_that_was_banned_meanwhile(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    """By another session's audit, say, or a proof."""
    await swarm.serve("a", 0, 3)
    cheat(await swarm.serve("liar", 3, 5, tokens_per_s=1e5), noisy)
    await swarm.serve("b", 3, 5, tokens_per_s=1)
    await swarm.serve("c", 5, 8)
    async with open_client(audit=AuditConfig(rate=0.0)) as client:
        generation = client.generate(PROMPT, max_new_tokens=3 * CHECK_EVERY)
        for _ in range(4):
            await anext(generation)
        assert [hop.peer_id for hop in generation.result.route] == ["a", "liar", "c"]
        client.ledger.ban("liar", "a proof")
        await text_of(generation)
        found = generation.result
        assert [hop.peer_id for hop in found.route] == ["a", "b", "c"]
        assert len(found.token_ids) == 3 * CHECK_EVERY
