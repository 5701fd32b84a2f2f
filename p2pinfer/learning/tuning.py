"""Tuners over a client's swarm: the adapter that a config asks for, its optimiser, its trainer."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import torch
import trio

from p2pinfer.client_config import TuneConfig
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.text.text import Tokenizer
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.host.network import Network

from .pass_watch import PassWatch
from .swarm_trainer import open_trainer
from .train_route import Routes
from .tuned_adapter import TunedAdapter, new_lora, new_prompt
from .tuner import Tuner


@asynccontextmanager
async def tuner_over(
    host: Network,
    ends: EmbeddingAndHead,
    tokenizer: Tokenizer,
    routes: Routes,
    table_changed: Callable[[], trio.Event],
    config: TuneConfig,
    adapter: TunedAdapter | None = None,
    watch: PassWatch | None = None,
) -> AsyncGenerator[Tuner]:
    """A tuner for as long as the block runs; what it has under way ends with it.

    Args:
        adapter: One to go on with; a new one by `config` otherwise.
        watch: Is shown every pass.

    Raises:
        ConfigError: The model has no such product.
    """
    if adapter is None:
        adapter = await trio.to_thread.run_sync(new_adapter, ends, config)
    optimizer = torch.optim.AdamW(
        adapter.parameters(), lr=config.rate(0), weight_decay=config.weight_decay, foreach=False
    )
    async with (
        open_trainer(host, ends.spec, routes, table_changed, watch=watch) as trainer,
        open_nursery() as nursery,
    ):
        yield Tuner(
            trainer,
            ends,
            tokenizer,
            adapter,
            optimizer,
            nursery,
            config.max_gradient_norm,
        )


def new_adapter(ends: EmbeddingAndHead, config: TuneConfig) -> TunedAdapter:
    """The adapter that a config asks for, as it is before the first step.

    Raises:
        ConfigError: The model has no such product.
    """
    spec = ends.spec
    if config.method == "lora":
        return new_lora(
            ends.architecture, spec.num_blocks, config.rank, config.alpha, config.targets, config.seed
        )
    # Begun as tokens of the vocabulary: noise of any size takes longer (Lester et al., 2104.08691, 3.2).
    drawn = random.Random(config.seed).choices(range(spec.vocab_size), k=config.prompt_tokens)
    return new_prompt(ends.embed(drawn).clone())
