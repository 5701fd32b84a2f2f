"""Texts over real blocks, and what one machine gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import trio

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import (
    NoRoute,
)
from p2pinfer.generation.draft_model import DraftModel
from p2pinfer.generation.generation import Generation, GenerationConfig, new_state
from p2pinfer.generation.outage import RetryLimits, Waiting
from p2pinfer.generation.remote_blocks import ExpectS
from p2pinfer.generation.saved_state import decode_state
from p2pinfer.generation.speculation import Speculation
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.compute.runner import Chunk, open_runner
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.sampling import Sampler, SamplingConfig
from p2pinfer.models.text.text import Tokenizer
from p2pinfer.routing.route import Route, RouteOutcome
from p2pinfer.session.chain import ReplaySource
from p2pinfer.session.hosting import open_session, start_session
from p2pinfer.session.session import Session
from p2pinfer.session.terms import PLAIN, Packing

from ..node.memory_swarm import FLOAT32, MemorySwarm

PROMPT = "Once upon a time"


def local_ids(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, prompt_ids: list[int], count: int, seed: int
) -> list[int]:
    """What one machine generates: greedily, or with a seed above 0."""
    sampler = Sampler(SamplingConfig(temperature=1.0 if seed else 0.0, seed=seed))
    runner = open_runner(checkpoint, BlockSpan(0, 8), FLOAT32)
    lease = runner.cache.reserve(len(prompt_ids) + count)
    ids, new = list(prompt_ids), list(prompt_ids)
    for _ in range(count):
        (hidden,) = runner.run([Chunk(lease, len(ids) - len(new), ends.embed(new))])
        new = [sampler.pick(ends.logits(hidden)[-1], len(ids))]
        ids += new
    return ids[len(prompt_ids) :]


class Walk:
    """Opens sessions over the routes it was given, one after the other."""

    def __init__(self, swarm: MemorySwarm, *routes: Route) -> None:
        self.asked: list[tuple[int, frozenset[str]]] = []
        self.outcomes: list[tuple[Route, RouteOutcome]] = []
        self.chunk_tokens = 3
        self._swarm = swarm
        self._host = swarm.network.host("client")
        self._routes = list(routes)

    @property
    def table_changed(self) -> trio.Event:
        return self._swarm.view.changed

    def offer(self, *routes: Route) -> None:
        """Have further routes from now on; the announcement that brings them is news."""
        self._routes += routes

    async def open_session(
        self,
        tokens: int,
        excluded: frozenset[str],
        replay_source: ReplaySource,
        *,
        packing: Packing = PLAIN,
    ) -> Session:
        self.asked.append((tokens, excluded))
        if not self._routes:
            raise NoRoute("no route: nobody serves blocks 0:8", [(0, 8)])
        return await start_session(
            self._swarm.network.nursery,
            open_session(
                self._host,
                self._routes.pop(0),
                self._swarm.spec,
                max_tokens=tokens,
                codec="float32",
                config=SessionConfig(chunk_tokens=self.chunk_tokens),
                packed=packing.tokens,
            ),
        )

    def route_ended(self, route: Route, outcome: RouteOutcome) -> None:
        self.outcomes.append((route, outcome))

    def connection_kind(self, peer_id: str) -> Literal["direct", "relayed"]:
        return "relayed" if peer_id == "b" else "direct"


def start(
    walk: Walk,
    swarm: MemorySwarm,
    ends: EmbeddingAndHead,
    tokenizer: Tokenizer,
    prompt: str = PROMPT,
    *,
    retry_limits: RetryLimits | None = None,
    speculation: Speculation | None = None,
    draft_model: DraftModel | None = None,
    expected_s: ExpectS = lambda _, __: None,
    on_wait: Callable[[Waiting], None] = lambda _: None,
    **options: Any,
) -> Generation:
    options.setdefault("max_new_tokens", 10)
    state = new_state(swarm.spec, tokenizer, prompt, GenerationConfig(**options))
    return Generation(
        walk,
        swarm.spec,
        ends,
        tokenizer,
        state,
        retry_limits=retry_limits,
        speculation=speculation,
        draft_model=draft_model,
        expected_s=expected_s,
        on_wait=on_wait,
    )


def resume(
    walk: Walk, swarm: MemorySwarm, ends: EmbeddingAndHead, tokenizer: Tokenizer, token: str | None
) -> Generation:
    """As another process would."""
    assert token is not None
    return Generation(walk, swarm.spec, ends, tokenizer, decode_state(token))
