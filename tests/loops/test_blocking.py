"""p2pinfer for people without trio."""

from __future__ import annotations

import gc
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import p2pinfer
from p2pinfer.client_config import TuneConfig
from p2pinfer.learning.swarm_trainer import Batch
from p2pinfer.loops.blocking import BlockingClient
from p2pinfer.models.learning.rows import Rows

from ..cli.support import start_node, wait_ready

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Generator[BlockingClient]:
    """A client with an embedded swarm of its own."""
    home = tmp_path_factory.mktemp("home")
    with p2pinfer.connect(data_dir=home, cache_dir=home) as swarm:
        yield swarm


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "p2pinfer"]


def test_a_generation_can_be_read_at_once_or_token_by_token(swarm: BlockingClient) -> None:
    text = swarm.generate("Once upon a time", max_new_tokens=8).text()
    assert text.startswith(", there was a little girl")
    generation = swarm.generate("Once upon a time", max_new_tokens=8)
    assert "".join(token.text for token in generation) == text
    assert generation.result.finish_reason == "length"
    assert list(generation) == []


def test_a_generation_that_was_left_goes_on(swarm: BlockingClient) -> None:
    whole = swarm.generate("Once upon a time", max_new_tokens=8).text()
    left = swarm.generate("Once upon a time", max_new_tokens=8)
    next(left)
    left.close()
    assert left.resume_token is not None
    resumed = swarm.resume(left.resume_token)
    assert resumed.text() == whole
    assert resumed.resume_token is not None
    longer = swarm.generate("Once upon a time", max_new_tokens=11).text()
    assert swarm.resume(resumed.resume_token, 3).text() == longer
    with pytest.raises(p2pinfer.ConfigError, match="not a resume token"):
        swarm.resume("0badcafe")


def test_peers_are_the_nodes(swarm: BlockingClient) -> None:
    spans = sorted(peer.announcement.span for peer in swarm.peers())
    assert [str(span) for span in spans] == ["0:3", "3:5", "5:8"]


def test_several_generations_at_once(swarm: BlockingClient) -> None:
    first = swarm.generate("Once upon a time", max_new_tokens=6)
    second = swarm.generate("The little fox", max_new_tokens=6)
    assert len(list(zip(first, second, strict=True))) == 6


def test_an_early_end_frees_what_the_hops_hold(swarm: BlockingClient) -> None:
    generation = swarm.generate("Once upon a time", max_new_tokens=200)
    next(generation)
    generation.close()
    generation.close()
    assert generation.result.finish_reason is None
    with pytest.raises(StopIteration):
        for _ in range(200):
            next(generation)


def test_a_forgotten_generation_ends_too(swarm: BlockingClient) -> None:
    generation = swarm.generate("Once upon a time", max_new_tokens=200)
    next(generation)
    del generation
    gc.collect()
    assert len(swarm.generate("Once", max_new_tokens=2).text()) > 0


def test_trainers_that_were_closed_or_forgotten_leave_the_hops(swarm: BlockingClient) -> None:
    """A hop lets four trainings of one client in (`serve.max_train_sessions_per_client`)."""
    order = torch.arange(4)
    batch = Batch(Rows([4], order, order), torch.ones(4, swarm.thread.client.spec.hidden_size))
    for number in range(6):
        trainer = swarm.trainer()
        assert trainer.forward(batch, keeps=False).output.shape == batch.hidden.shape
        assert len(trainer.route.hops) == 3
        if number % 2:
            trainer.close()
            trainer.close()
            with pytest.raises(p2pinfer.LocalError, match="was closed"):
                trainer.forward(batch)
        del trainer
        gc.collect()


def test_tuners_that_were_closed_or_forgotten_leave_the_hops(swarm: BlockingClient) -> None:
    for number in range(6):
        tuner = swarm.tuner(TuneConfig(rank=1))
        assert tuner.forward_backward([tuner.example("Once", " upon a time")])().loss > 0
        if number % 2:
            tuner.close()
            with pytest.raises(p2pinfer.LocalError, match="was closed"):
                tuner.optim_step()
        del tuner
        gc.collect()


def test_errors_come_out_where_the_mistake_is(swarm: BlockingClient) -> None:
    with pytest.raises(p2pinfer.PromptTooLong):
        swarm.generate("word " * 2000)
    with pytest.raises(p2pinfer.ConfigError, match="max_tokens"):
        cast("Any", swarm).generate("Once", max_tokens=3)


def test_a_model_that_is_not_there_ends_connecting_and_its_thread(tmp_path: Path) -> None:
    before = threads()
    with pytest.raises(p2pinfer.ModelNotFound):
        p2pinfer.connect(model="no/such/folder", data_dir=tmp_path)
    assert threads() == before


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """Where a node is that holds the whole model."""
    node = start_node(tmp_path_factory.mktemp("node"), "0:8")
    yield wait_ready(node)["addrs"][0]
    node.terminate()
    node.communicate(timeout=90)


def test_a_failure_on_the_way_comes_out_of_the_iteration(address: str, tmp_path: Path) -> None:
    config = p2pinfer.ClientConfig(find_timeout_s=0.1, policy=f"{__name__}:Nobody")
    lonely = p2pinfer.connect(policy=Nobody(), config=config, bootstrap=[address], data_dir=tmp_path)
    with lonely, pytest.raises(p2pinfer.NoRoute, match="nobody is good enough"):
        lonely.generate("Once").text()
    lonely.close()
    with pytest.raises(p2pinfer.LocalError, match="this client is closed"):
        lonely.generate("Once")
    with pytest.raises(p2pinfer.LocalError, match="this client is closed"):
        lonely.peers()


def test_what_is_being_generated_ends_with_the_client(address: str, tmp_path: Path) -> None:
    other = p2pinfer.connect(bootstrap=[address], data_dir=tmp_path)
    generation = other.generate("Once upon a time", max_new_tokens=200)
    next(generation)
    other.close()
    with pytest.raises(p2pinfer.LocalError, match="this client is closed"):
        for _ in range(200):
            next(generation)
    generation.close()


class Nobody(p2pinfer.RoutingPolicy):
    """Chooses no route, whatever there is."""

    def choose_routes(self, candidates: object, request: object, view: object) -> list[p2pinfer.Route]:
        raise p2pinfer.NoRoute("nobody is good enough")
