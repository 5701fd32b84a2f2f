from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import PropertyMock

import pytest
import torch
import trio
from torch import Tensor

from p2pinfer.errors import LocalError, NoRoute
from p2pinfer.learning import swarm_trainer
from p2pinfer.learning.swarm_trainer import Batch, SwarmTrainer
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.learning.span_passes import SpanPasses
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.protocol import train_stream
from p2pinfer.node.protocol.train_messages import Backward, Backwarded, Forward, TrainMessage
from p2pinfer.node.protocol.train_stream import TrainStream

from ..node.memory import MemoryStream
from .support import OTHERS, WAY, Peers, Task, close, make_task, open_training


@pytest.fixture(scope="module")
def task(checkpoint: Checkpoint) -> Task:
    return make_task(checkpoint)


async def check(trainer: SwarmTrainer, task: Task) -> None:
    """One pass there and back gives what one machine gives."""
    trace = await trainer.forward(task.batch, task.adapter)
    assert close(trace.output, task.output)
    await check_backward(trainer, task, trace)


async def check_backward(trainer: SwarmTrainer, task: Task, trace: swarm_trainer.Trace) -> None:
    hidden, adapter = await trainer.backward(trace, task.gradient)
    assert hidden is not None and adapter is not None
    assert close(hidden, task.of_hidden)
    assert close(task.vector(adapter), task.of_adapter)


async def test_passes_over_hops_give_what_one_machine_gives(checkpoint: Checkpoint, task: Task) -> None:
    async with open_training(checkpoint, Peers(WAY)) as (trainer, swarm):
        for _ in range(2):
            await check(trainer, task)
        assert trainer.route.peer_ids == ("a", "b", "c")
        assert all(not each.training.kept_bytes for each in swarm.served.values())


async def test_a_batch_is_cut_into_microbatches(
    checkpoint: Checkpoint, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm_trainer, "MICROBATCH_TOKENS", 11)
    async with open_training(checkpoint, Peers(WAY)) as (trainer, _):
        trace = await trainer.forward(task.batch, task.adapter)
        assert [part.stop - part.start for part, _ in trace.microbatches] == [7, 10, 11, 1]
        assert close(trace.output, task.output)
        await check_backward(trainer, task, trace)


async def test_adapters_travel_once_until_they_change(
    checkpoint: Checkpoint, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    send = TrainStream.send

    async def spied(stream: TrainStream, message: TrainMessage, *payload: bytes) -> None:
        if stream.peer_id == "a":
            sent.append(type(message).__name__)
        await send(stream, message, *payload)

    monkeypatch.setattr(train_stream.TrainStream, "send", spied)
    monkeypatch.setattr(swarm_trainer, "MICROBATCH_TOKENS", 11)
    async with open_training(checkpoint, Peers(WAY)) as (trainer, _):
        await check(trainer, task)
        assert sent.count("Adapt") == 1
        assert sent.count("Forward") == sent.count("Backward") == 4
        await check(trainer, task)
        assert sent.count("Adapt") == 1


@pytest.mark.parametrize("victim", sorted(WAY))
@pytest.mark.parametrize("moment", [Forward, Backward])
async def test_a_hop_that_dies_in_a_pass_is_replaced_and_nothing_counts_twice(
    checkpoint: Checkpoint, task: Task, monkeypatch: pytest.MonkeyPatch, victim: str, moment: type
) -> None:
    """It dies when it is asked, with other microbatches under way; others take over with other cuts."""
    monkeypatch.setattr(swarm_trainer, "MICROBATCH_TOKENS", 11)
    peers = Peers({**WAY, **OTHERS})
    async with open_training(checkpoint, peers) as (trainer, swarm):
        send = TrainStream.send
        asked = 0

        async def deadly(stream: TrainStream, message: TrainMessage, *payload: bytes) -> None:
            nonlocal asked
            await send(stream, message, *payload)
            if stream.peer_id == victim and isinstance(message, moment):
                asked += 1
                if asked == 2:
                    await swarm.network.kill(victim)

        monkeypatch.setattr(train_stream.TrainStream, "send", deadly)
        await check(trainer, task)
        assert asked >= 2
        assert victim not in trainer.route.peer_ids
        assert {peer for peer, _ in peers.failed} == {victim}


@pytest.mark.parametrize("is_true", [True, False])
async def test_the_next_hop_is_asked_before_the_adapters_gradient_is_here(
    checkpoint: Checkpoint, task: Task, monkeypatch: pytest.MonkeyPatch, is_true: bool
) -> None:
    """What it then gives counts only if the receipt for all of it is right."""
    peers = Peers({**WAY, **OTHERS})
    async with open_training(checkpoint, peers) as (trainer, _):
        trace = await trainer.forward(task.batch, task.adapter)
        last = task.adapter.part(BlockSpan(*WAY["c"]))
        assert last is not None
        asked, came = trio.Event(), list[int]()
        send, send_all = TrainStream.send, MemoryStream.send_all

        async def spied(stream: TrainStream, message: TrainMessage, *payload: bytes) -> None:
            await send(stream, message, *payload)
            if stream.peer_id == "b" and isinstance(message, Backward):
                asked.set()

        async def late(stream: MemoryStream, data: bytes | bytearray | memoryview) -> None:
            if stream.peer_id == "client" and len(data) == len(last.payload) and not came:
                came.append(len(data))
                with trio.fail_after(30):
                    await asked.wait()
                data = data if is_true else bytes(len(data))
            await send_all(stream, data)

        monkeypatch.setattr(train_stream.TrainStream, "send", spied)
        monkeypatch.setattr(MemoryStream, "send_all", late)
        await check_backward(trainer, task, trace)
        assert came
        assert ("c" in trainer.route.peer_ids) == is_true
        assert [peer for peer, _ in peers.failed] == ([] if is_true else ["c"])


@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_first_part_that_is_wrong_goes_to_no_other_hop(
    checkpoint: Checkpoint, task: Task, monkeypatch: pytest.MonkeyPatch, is_whole: bool
) -> None:
    """Values that are not finite, or fewer of them than there have to be."""
    peers = Peers({**WAY, **OTHERS})
    async with open_training(checkpoint, peers) as (trainer, _):
        trace = await trainer.forward(task.batch, task.adapter)
        asked: list[str] = []
        send = TrainStream.send

        async def wrong(stream: TrainStream, message: TrainMessage, *payload: bytes) -> None:
            if isinstance(message, Backward):
                asked.append(stream.peer_id)
            if isinstance(message, Backwarded) and asked == ["c"]:
                payload = (b"\xff" * len(payload[0]), payload[1]) if is_whole else (b"\0" * 8,)
            await send(stream, message, *payload)

        monkeypatch.setattr(train_stream.TrainStream, "send", wrong)
        await check_backward(trainer, task, trace)
        assert asked[:2] == ["c", "f"]
        assert [peer for peer, _ in peers.failed] == ["c"]


async def test_a_hop_that_leaves_is_replaced(checkpoint: Checkpoint, task: Task) -> None:
    async with open_training(checkpoint, Peers({**WAY, **OTHERS})) as (trainer, swarm):
        trace = await trainer.forward(task.batch, task.adapter)
        swarm.served["b"].training.refuse_newcomers()
        await check_backward(trainer, task, trace)
        assert "b" not in trainer.route.peer_ids


async def test_inputs_that_are_not_kept_are_sent_again(checkpoint: Checkpoint, task: Task) -> None:
    config = replace(ServeConfig(), train_bytes=1000)
    async with open_training(checkpoint, Peers(WAY), config=config) as (trainer, _):
        await check(trainer, task)
        assert trainer.route.peer_ids == ("a", "b", "c")


async def test_a_batch_is_cut_so_that_every_hop_has_a_part(
    checkpoint: Checkpoint, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm_trainer, "MICROBATCH_TOKENS", 1024)
    async with open_training(checkpoint, Peers(WAY)) as (trainer, _):
        whole = await trainer.forward(task.batch, task.adapter)
        assert len(whole.microbatches) == 1  # too small to be cut
        monkeypatch.setattr(swarm_trainer, "LEAST_TOKENS", 8)
        cut = await trainer.forward(task.batch, task.adapter)
        assert len(cut.microbatches) >= len(trainer.route.peer_ids)
        assert close(cut.output, whole.output)


async def test_a_node_on_a_gpu_keeps_as_much_as_there_is_room_for(
    checkpoint: Checkpoint, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = PropertyMock(return_value=80 << 30)
    monkeypatch.setattr(SpanPasses, "card_free_bytes", free)
    async with open_training(checkpoint, Peers(WAY)) as (trainer, swarm):
        await trainer.forward(task.batch, task.adapter)
        served: Any = swarm.served["a"].training
        assert served._kept.max_bytes == 20 << 30


async def test_dropout_is_the_same_wherever_a_pass_is_run_again(checkpoint: Checkpoint) -> None:
    """The seed of a microbatch is that of the call and its place."""
    dropping = make_task(checkpoint, dropout=0.3, seed=5 * 4096)
    async with open_training(checkpoint, Peers({**WAY, **OTHERS})) as (trainer, swarm):
        trace = await trainer.forward(dropping.batch, dropping.adapter, seed=5)
        assert close(trace.output, dropping.output)
        await swarm.network.kill("b")
        await check_backward(trainer, dropping, trace)


async def test_a_part_of_the_blocks_can_be_run(checkpoint: Checkpoint, task: Task) -> None:
    async with open_training(checkpoint, Peers(WAY)) as (trainer, _):
        hidden = task.batch.hidden
        for span in (BlockSpan(0, 2), BlockSpan(2, 7), BlockSpan(7, 8)):
            trace = await trainer.forward(Batch(task.batch.rows, hidden), task.adapter, span=span)
            hidden = trace.output
        assert close(hidden, task.output)


async def test_nothing_is_computed_below_the_adapter_where_nobody_wants_it(
    checkpoint: Checkpoint, task: Task
) -> None:
    async with open_training(checkpoint, Peers(WAY)) as (trainer, _):
        trace = await trainer.forward(task.batch, task.adapter)
        hidden, adapter = await trainer.backward(trace, task.gradient, wants_hidden=False)
        assert hidden is None and adapter is not None
        assert close(task.vector(adapter), task.of_adapter)


async def test_values_that_are_not_finite_are_the_trainers_own_and_blame_nobody(
    checkpoint: Checkpoint, task: Task
) -> None:
    peers = Peers(WAY)
    async with open_training(checkpoint, peers) as (trainer, _):
        trace = await trainer.forward(task.batch, task.adapter)
        with pytest.raises(LocalError, match="the training has diverged"):
            await trainer.backward(trace, torch.full_like(task.gradient, float("nan")))
        assert not peers.failed


async def test_a_sequence_that_is_too_long_for_the_hops_is_refused_with_a_sentence(
    checkpoint: Checkpoint, task: Task
) -> None:
    config = replace(ServeConfig(), train_tokens=10)
    async with open_training(checkpoint, Peers(WAY), config=config) as (trainer, _):
        with pytest.raises(LocalError, match=r"11 tokens; the hops of this route take 10"):
            await trainer.forward(task.batch, task.adapter)


async def test_without_anybody_for_some_blocks_there_is_no_route(checkpoint: Checkpoint, task: Task) -> None:
    async with open_training(checkpoint, Peers({"a": (0, 3), "c": (5, 8)})) as (trainer, _):
        with pytest.raises(NoRoute, match="nobody is left"):
            await trainer.forward(task.batch, task.adapter)


async def test_a_peer_that_does_not_train_is_left_out_and_keeps_its_good_name(
    checkpoint: Checkpoint, task: Task
) -> None:
    peers = Peers({**WAY, "d": (3, 5)})
    async with open_training(checkpoint, peers) as (trainer, swarm):
        swarm.served["b"].training.unregister()
        swarm.served["b"].training.refuse_newcomers()
        await check(trainer, task)
        assert trainer.route.peer_ids == ("a", "d", "c")


async def test_hops_of_two_dtypes_are_sent_float32(checkpoint: Checkpoint, task: Task) -> None:
    peers = Peers(WAY)
    bfloat16 = ComputeConfig(device="cpu", dtype="bfloat16", threads=1, cache_bytes=1 << 20)
    async with open_training(checkpoint, peers, compute=bfloat16) as (trainer, _):
        trace = await trainer.forward(task.batch, task.adapter)
        hidden, adapter = await trainer.backward(trace, task.gradient)
        assert adapter is not None and hidden is not None
        assert similar(task.vector(adapter), task.of_adapter) > 0.98
        assert similar(hidden.flatten(), task.of_hidden.flatten()) > 0.98


def similar(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one, other, dim=0))
