"""Forecast of a swarm that does not exist yet: what each peer holds, and how fast a text will come.

Peers that are alike take their blocks one after another, each by the rule that a node follows. The planner
then picks the route, and its prediction is the one that a running generation is compared with: compute,
delays and bytes, where no hop fails or lies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.machine.memory import WEIGHTS_SHARE
from p2pinfer.models.numerics import Numerics
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.config import RoutingConfig
from p2pinfer.routing.cost import route_cost
from p2pinfer.routing.placement import choose_span
from p2pinfer.routing.planner import plan_route
from p2pinfer.routing.route import Candidate, Route, RouteRequest
from p2pinfer.session.flow_limits import CHUNK_S

MAX_PEERS = 256  # of a forecast; the rule by which they take blocks looks at all of them for each


@dataclass(frozen=True, slots=True)
class Assumed:
    """Assumptions of a forecast about every peer and every line.

    Attributes:
        peers: Number of them, the client not counted.
        numerics: What they hold weights as and compute in.
        block_s: Seconds that one token takes in one block, as a node measures it.
        up_bytes_per_s: Upload of each peer, and of the client.
        rtt_ms: Round trip between any two, client included.
        context_tokens: Prompt and answer of the text that each has room for.
        prompt_tokens: Of the prompt that is timed.
    """

    peers: int
    numerics: Numerics
    block_s: float
    up_bytes_per_s: float
    rtt_ms: float
    context_tokens: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """Expectations of such a swarm.

    Attributes:
        assumed: What that rests on.
        route: Of a text; its hops are of peers that are numbered.
        blocks: That each peer holds; the last peers may have others' blocks as well.
        weights_bytes: Memory for them at each peer.
        cache_bytes: Memory for the keys and values of one text at each peer.
        hidden_bytes: Sent by the client and by each hop, for each token.
        head_bytes: Of embedding and head, held by the client.
        head_s: That the client takes to draw a token.
        compute_s: That one token takes in all blocks.
        trip_s: From hop to hop and back, compute included: the planner's prediction.
        prompt_lines_s: That lines alone take until a prompt is through; compute comes on top.
    """

    assumed: Assumed
    route: Route
    blocks: int
    weights_bytes: int
    cache_bytes: int
    hidden_bytes: int
    head_bytes: int
    head_s: float
    compute_s: float
    trip_s: float
    prompt_lines_s: float

    @property
    def memory_bytes(self) -> float:
        """Free memory with which a node takes so many blocks; the cache finds room in what weights leave."""
        return max(self.weights_bytes / WEIGHTS_SHARE, self.weights_bytes + self.cache_bytes)

    @property
    def tokens_per_s(self) -> float:
        """Of one text, drawn token by token, without guesses."""
        return 1 / (self.trip_s + self.head_s)


def forecast(spec: ModelSpec, assumed: Assumed, config: RoutingConfig | None = None) -> Forecast:
    """Forecast of a text by a swarm of equal peers.

    Args:
        config: What else the planner reckons with; its bandwidth and round trip are replaced.

    Raises:
        ValueError: There are no peers, too many, or a figure is not above 0.
    """
    _check(assumed)
    config = replace(
        config or RoutingConfig(),
        bandwidth_bytes_per_s=assumed.up_bytes_per_s,
        default_rtt_ms=assumed.rtt_ms,
    )
    candidates = _peers(spec, assumed)
    hidden_bytes = assumed.numerics.row_bytes(spec.hidden_size)
    request = RouteRequest(spec.revision, spec.num_blocks, hidden_bytes, assumed.context_tokens)
    route = plan_route(candidates, request, None, config)
    blocks = len(candidates[0].span)
    block_bytes = spec.block_bytes(assumed.numerics)
    head_bytes = spec.vocab_size * spec.hidden_size * assumed.numerics.bytes_per_value
    cached = spec.kv_bytes_per_token_per_block(assumed.numerics) * assumed.context_tokens
    return Forecast(
        assumed,
        route,
        blocks,
        blocks * block_bytes,
        blocks * cached,
        hidden_bytes,
        head_bytes,
        # A product with the head reads every weight of it once, as a block's products do.
        head_bytes / block_bytes * assumed.block_s,
        spec.num_blocks * assumed.block_s,
        route_cost(route, candidates, request, None, config),
        _prompt_s(hidden_bytes * assumed.prompt_tokens, len(route.hops), assumed),
    )


def fewest_peers(spec: ModelSpec, numerics: Numerics, context_tokens: int, room_bytes: float) -> int | None:
    """Number of peers that hold the model, where each has so many bytes free; None if not one block fits."""
    weights = spec.block_bytes(numerics)
    cache = spec.kv_bytes_per_token_per_block(numerics) * context_tokens
    each = int(room_bytes // max(weights / WEIGHTS_SHARE, weights + cache))
    return math.ceil(spec.num_blocks / each) if each else None


def _peers(spec: ModelSpec, assumed: Assumed) -> list[Candidate]:
    """Peers with the blocks that they take, each having seen the ones before."""
    capacity = math.ceil(spec.num_blocks / assumed.peers)
    said: list[Announcement] = []
    for number in range(assumed.peers):
        span = choose_span(said, spec.num_blocks, capacity, 1 / assumed.block_s)
        said.append(
            Announcement(
                f"peer {number + 1:03}",
                spec.model,
                spec.revision,
                span,
                str(assumed.numerics),
                1 / (assumed.block_s * len(span)),
                assumed.context_tokens,
                sequence=1,
                reachability="public",  # direct lines: a relay's detour depends on whose router fails
            )
        )
    return [Candidate(each) for each in said]


def _prompt_s(prompt_bytes: float, hops: int, assumed: Assumed) -> float:
    """Seconds of a prompt on its lines: chunks follow each other, so only one of them is sent hop by hop."""
    sent_s = prompt_bytes / assumed.up_bytes_per_s
    return sent_s + hops * min(CHUNK_S, sent_s) + (hops + 1) * assumed.rtt_ms / 2000


def _check(assumed: Assumed) -> None:
    if not 1 <= assumed.peers <= MAX_PEERS:
        raise ValueError(f"{assumed.peers} peers: a forecast is of 1 to {MAX_PEERS}")
    figures = assumed.block_s, assumed.up_bytes_per_s, assumed.context_tokens, assumed.prompt_tokens
    if min(figures) <= 0 or assumed.rtt_ms < 0:
        raise ValueError("a forecast takes figures above 0; only a round trip may be 0")
