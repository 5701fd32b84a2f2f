"""A verifier as a user writes it, from docs/audits.md, audits sessions from end to end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

import p2pinfer
from p2pinfer.audit.auditor import AuditTally
from p2pinfer.models.compute.runner import Chunk
from p2pinfer.models.span import BlockSpan

from ..node.memory_swarm import MemorySwarm, Served
from .audited_swarm import PROMPT, OpenClient, open_client, swarm, text_of

__all__ = ["open_client", "swarm"]  # fixtures

DOCUMENT = (Path(__file__).parents[2] / "docs" / "audits.md").read_text(encoding="utf-8")


@pytest.fixture
def lazy() -> p2pinfer.Verifier:
    """The document's verifier, as a reader would save it."""
    (source,) = re.findall(r"^```python Lazy\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    names: dict[str, type[p2pinfer.Verifier]] = {}
    exec(source, names)
    return names["Lazy"]()


def hand_on(served: Served) -> None:
    """Let a peer answer with what it was given."""

    def run(chunks: Sequence[Chunk], span: BlockSpan | None = None) -> list[Tensor]:
        return [chunk.hidden.clone() for chunk in chunks]

    served.runner.run = run  # type: ignore[method-assign]


async def test_it_bans_who_hands_on_its_input_and_nobody_else(
    swarm: MemorySwarm, open_client: OpenClient, lazy: p2pinfer.Verifier
) -> None:
    await swarm.serve("a", 0, 3)
    hand_on(await swarm.serve("b", 3, 5))
    await swarm.serve("c", 5, 8)
    async with open_client(verifier=lazy) as client:
        await text_of(client.generate(PROMPT, max_new_tokens=24))
        await client.audits_settled()
        assert client.audits == AuditTally(done=3, failed=1, inconclusive=2)
        assert [name for name in "abc" if client.ledger.is_banned(name)] == ["b"]
        ban = client.ledger.account("b").ban
        assert ban is not None
        assert ban.why == "its blocks changed their input by 0.00%"


async def test_where_it_cannot_judge_two_others_are_asked(
    swarm: MemorySwarm, open_client: OpenClient, lazy: p2pinfer.Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hold_nothing(span: BlockSpan) -> bool:
        return False

    monkeypatch.setattr(lazy, "can_hold", hold_nothing)
    await swarm.serve("a", 0, 8, tokens_per_s=1e5)
    async with open_client(verifier=lazy) as client:
        await text_of(client.generate(PROMPT, max_new_tokens=12))
        await client.audits_settled()
        assert client.audits == AuditTally(done=1, inconclusive=1)  # there is nobody else
