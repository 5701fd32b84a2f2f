"""A swarm in memory whose peers may cheat, and clients that audit all that they do."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pinfer import client as client_module
from p2pinfer.audit import auditor as audit_module
from p2pinfer.audit import evidence_source, second_opinion
from p2pinfer.audit.auditor import Auditor
from p2pinfer.client import Client, ClientConfig
from p2pinfer.client_config import AuditConfig, SessionConfig
from p2pinfer.generation.generation import Generation
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.runner import Chunk
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.network import Network
from p2pinfer.node.swarm.membership import SwarmMember
from p2pinfer.node.transport.identity import Identity
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.routing.config import RoutingConfig
from p2pinfer.routing.policy import RiskAdjusted

from ..node.memory_swarm import MemorySwarm, Served, open_memory_swarm

PROMPT = "Once upon a time"
ALWAYS = AuditConfig(rate=1.0, linger_s=60.0)
OpenClient = Callable[..., AbstractAsyncContextManager[Client]]
Change = Callable[[Tensor], Tensor]


@pytest.fixture
async def swarm(checkpoint: Checkpoint) -> AsyncGenerator[MemorySwarm]:
    async with open_memory_swarm(checkpoint, limit_s=120) as opened:
        yield opened


@pytest.fixture
def open_client(swarm: MemorySwarm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OpenClient:
    """Opens clients that audit everything and explore nothing, each with a ledger of its own."""

    @asynccontextmanager
    async def join(identity: Identity, *_: object) -> AsyncGenerator[SwarmMember]:
        yield swarm.member(identity.peer_id)

    @asynccontextmanager
    async def throw_away(identity: Identity, *_: object) -> AsyncGenerator[Network]:
        yield swarm.network.host(identity.peer_id)

    @asynccontextmanager
    async def opened(**options: Any) -> AsyncGenerator[Client]:
        # A token a step: what is audited, and what steps say, is told by their number here.
        config = ClientConfig(dtype="float32", draft="off", speculate="off")
        options = {"audit": ALWAYS, "config": config, **options}
        # Machines may be busy, and whoever replaced a hop is not asked for an opinion of it.
        options.setdefault("session_config", SessionConfig(slow_step_s=60.0))
        options.setdefault("reputation", Ledger())
        options.setdefault("policy", RiskAdjusted(RoutingConfig(explore_share=0.0, probation_share=0.0)))
        async with Client(cache_dir=tmp_path, data_dir=tmp_path, **options) as client:
            yield client

    monkeypatch.setattr(evidence_source, "RETRY_S", ())
    monkeypatch.setattr(audit_module, "HAND_OUT_S", 0.2)  # there is not always somebody to fetch a proof
    monkeypatch.setattr(client_module, "open_swarm", join)
    monkeypatch.setattr(second_opinion, "open_host", throw_away)
    return opened


def cheat(served: Served, change: Change) -> None:
    """Let a peer give something else than its blocks do."""
    honest = served.runner.run

    def run(chunks: Sequence[Chunk], span: BlockSpan | None = None) -> list[Tensor]:
        return [change(output) for output in honest(chunks, span)]

    served.runner.run = run  # type: ignore[method-assign]


def noisy(output: Tensor, generator: torch.Generator | None = None) -> Tensor:
    length = output.square().sum(-1, keepdim=True).sqrt()
    return output + 0.05 * length * torch.randn(output.shape, generator=generator) / 18


async def text_of(generation: Generation) -> str:
    async for _ in generation:
        pass
    return generation.result.text


def auditor_of(client: Client) -> Auditor:
    """The part of a client that audits."""
    auditor = client._auditor  # pyright: ignore[reportPrivateUsage]
    assert auditor is not None
    return auditor
