"""Training over node processes, one of which is killed or leaves while it computes: losses do not tell."""

from __future__ import annotations

import signal

import pytest
import torch
import trio
from torch import Tensor

from p2pinfer.client import Client
from p2pinfer.client_config import AuditConfig, TuneConfig
from p2pinfer.node.protocol.train_messages import Backward, Forward, TrainMessage
from p2pinfer.node.protocol.train_stream import TrainStream

from .support import Along, StartNode, Swarm

pytestmark = pytest.mark.slow

TEXTS = ["Tom has a cat.", "Lily has a small dog and a ball.", "Ben is sad.", "The sun is up in the sky."]
STEPS = 3


async def train(client: Client) -> tuple[list[float], list[Tensor], tuple[str, ...]]:
    """Losses, the adapter, and who computed the last step; two microbatches are under way at once."""
    async with client.tuner(TuneConfig(rank=4, targets=("q_proj", "down_proj"), seed=1)) as tuner:
        examples = [tuner.example("", text) for text in TEXTS]
        losses: list[float] = []
        for _ in range(STEPS):
            for part in (examples[:2], examples[2:]):
                tuner.forward_backward(part)
            losses.append((await tuner.optim_step(1e-2)).loss)
        return losses, [each.detach().clone() for each in tuner.adapter.parameters()], tuner.hops


@pytest.mark.parametrize(
    ("position", "moment", "signum"),
    [
        pytest.param(0, Backward, signal.SIGKILL, id="first, killed on the way back"),
        pytest.param(1, Forward, signal.SIGKILL, id="middle, killed on the way there"),
        pytest.param(2, Backward, signal.SIGINT, id="last, drained on the way back"),
        pytest.param(0, Forward, signal.SIGKILL, id="first, killed there", marks=pytest.mark.sweep),
        pytest.param(1, Backward, signal.SIGKILL, id="middle, killed back", marks=pytest.mark.sweep),
        pytest.param(2, Forward, signal.SIGKILL, id="last, killed there", marks=pytest.mark.sweep),
        pytest.param(2, Backward, signal.SIGKILL, id="last, killed back", marks=pytest.mark.sweep),
        pytest.param(0, Forward, signal.SIGINT, id="first, drained there", marks=pytest.mark.sweep),
        pytest.param(1, Forward, signal.SIGINT, id="middle, drained there", marks=pytest.mark.sweep),
    ],
)
async def test_a_hop_that_goes_in_a_pass_changes_no_loss(
    position: int,
    moment: type[TrainMessage],
    signum: signal.Signals,
    swarm: Swarm,
    start_node: StartNode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node, nobody = start_node(), AuditConfig(rate=0.0)
    way = [(swarm.peers[0], 0, 3), (swarm.peers[1], 3, 5), (swarm.peers[2], 5, 8)]
    async with swarm.client(policy=Along(way), audit=nobody) as client:
        losses, adapter, _ = await train(client)
    peer_id, _ = await trio.to_thread.run_sync(node.ready)
    way[position] = (peer_id, *way[position][1:])
    send, asked = TrainStream.send, 0

    async def deadly(stream: TrainStream, message: TrainMessage, *payload: bytes) -> None:
        nonlocal asked
        await send(stream, message, *payload)
        if stream.peer_id == peer_id and isinstance(message, moment):
            asked += 1
            if asked == 3:  # in the second step, with another microbatch under way
                node.signal(signum)

    monkeypatch.setattr(TrainStream, "send", deadly)
    async with swarm.client(policy=Along(way), audit=nobody) as client:
        others, other, hops = await train(client)
    assert asked >= 3
    assert peer_id not in hops
    assert others == pytest.approx(losses, rel=1e-5)
    for one, two in zip(adapter, other, strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-5)
