"""Idle-time audits of a node: it checks others while it has nothing to serve (`--verify`).

    nobody is served -> a client under a throw-away identity -> texts over peers known least -> audits
         ^                                                                                        |
         '----------------- a pause, so long that the whole takes `share` of the time <-----------'

To the peers it is a client like any other: short texts, drawn at random, from an identity that they have not
seen before. Every hop is audited, and what can be proved is published. As soon as somebody wants something of
this node, the round is given up.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Final

import trio

from p2pinfer.audit.local_verifier import LocalVerifier
from p2pinfer.audit.verifier import Verifier
from p2pinfer.models.checkpoint.source import ModelSource, resolve_model
from p2pinfer.node.concurrency.pulse import Pulse
from p2pinfer.node.events import Event, Ready, SessionClosed, SessionOpened, Verified
from p2pinfer.node.host_config import HostConfig
from p2pinfer.reputation.verdict import Thresholds
from p2pinfer.reputation.view import ReputationView
from p2pinfer.routing.drawing import draw_routes
from p2pinfer.routing.policy import RoutingPolicy
from p2pinfer.routing.route import Candidate, Route, RouteRequest

from .client import Client
from .client_config import AuditConfig, GenerationConfig
from .client_config import VerifyConfig as VerifyConfig
from .config import SharedConfig
from .errors import ModelChanged, NoRoute, P2PInferError

logger = logging.getLogger(__name__)

# Where texts begin; they go on as chance and the model have it.
OPENINGS: Final = (
    "Once upon a time",
    "The best way to",
    "Yesterday I went to",
    "Here is a short summary of",
    "In the morning, she",
    "Write a letter to",
    "There are three reasons why",
    "The old man looked at",
    "How do I",
    "It was raining, and",
    "First, let us",
    "My favourite",
)


OpenClient = Callable[[RoutingPolicy, str, Sequence[str]], AbstractAsyncContextManager[Client]]


class IdleAudits:
    """Checks others whenever a node has nothing to do.

    Args:
        open_client: Given a policy, the node's id and its addresses, joins the swarm by them as a client that
            goes by the policy and audits all it uses.
        report: Told what a round came to.
    """

    def __init__(
        self,
        open_client: OpenClient,
        config: VerifyConfig,
        report: Callable[[Event], None] = lambda _: None,
        rng: random.Random | None = None,
    ) -> None:
        self._open_client = open_client
        self._config = config
        self._report = report
        self._rng = rng or random.SystemRandom()
        self._node: Ready | None = None
        self._client_id = ""  # of the round that is under way
        self._sessions = 0
        self._changed = Pulse()
        self._round = trio.CancelScope()
        self._texts: list[str] = []

    def note(self, event: Event) -> None:
        """Take in what the node does."""
        match event:
            case Ready():
                self._node = event
            case SessionOpened(sessions=sessions):
                self._sessions = sessions
                if event.peer_id != self._client_id:
                    self._round.cancel()
            case SessionClosed(sessions=sessions):
                self._sessions = sessions
            case _:
                return
        self._changed.fire()

    async def serve(self) -> None:
        """Make rounds until cancelled."""
        while True:
            node = await self._until_idle()
            began_at = trio.current_time()
            with trio.CancelScope() as self._round:
                await self._make_round(node)
            spent_s = trio.current_time() - began_at
            rest_s = max(self._config.pause_s, spent_s * (1 / self._config.share - 1))
            await trio.sleep(rest_s * self._rng.uniform(0.5, 1.5))

    async def _until_idle(self) -> Ready:
        """Wait until the node serves, and has had nothing to do for a while."""
        while True:
            changed = self._changed.next
            if self._node is None or self._sessions:
                await changed.wait()
                continue
            with trio.move_on_after(self._config.idle_s):
                await changed.wait()
                continue
            return self._node

    async def _make_round(self, node: Ready) -> None:
        policy = LeastKnown(node.peer_id, self._rng)
        try:
            async with self._open_client(policy, node.peer_id, node.addrs) as client:
                self._client_id = client.member.peer_id
                for _ in range(self._rng.randint(1, self._config.texts)):
                    await self._make_text(client)
                await client.audits_settled()
                tally = client.audits
        except ModelChanged as exc:
            logger.warning("%s", exc)
        except P2PInferError as exc:  # nobody there, say
            logger.debug("idle_audits.failed why=%s", exc)
        else:
            self._report(Verified(tally.done, tally.passed, tally.failed, tally.suspect))
        finally:
            self._client_id = ""

    async def _make_text(self, client: Client) -> None:
        rng = self._rng
        prompt = rng.choice([*OPENINGS, *self._texts])
        length = draw_length(self._config.max_new_tokens, rng)
        config = GenerationConfig(max_new_tokens=length, temperature=0.8, seed=rng.getrandbits(60))
        generation = client.generate(prompt, config)
        try:
            async for _ in generation:
                pass
        finally:
            await generation.aclose()
        words = f"{prompt}{generation.result.text}".split()
        beginning = rng.randrange(max(1, len(words) - 4))
        self._texts = [" ".join(words[beginning : beginning + rng.randint(4, 24)]), *self._texts[:7]]


def open_idle_audits(
    verify: VerifyConfig,
    audit: AuditConfig,
    shared: SharedConfig,
    host_config: HostConfig,
    report: Callable[[Event], None],
) -> IdleAudits:
    """The idle-time audits of a node with these settings; what it learns goes to the ledger in `data_dir`."""
    verifiers: list[Verifier] = []  # one, whose weights stay loaded from round to round
    sources: list[ModelSource] = []  # what it loads them from

    @asynccontextmanager
    async def open_client(policy: RoutingPolicy, own: str, addrs: Sequence[str]) -> AsyncGenerator[Client]:
        config = replace(
            audit, rate=1.0, linger_s=max(audit.linger_s, 60.0), own_peers=(*audit.own_peers, own)
        )
        if not verifiers:
            source = await trio.to_thread.run_sync(
                partial(
                    resolve_model,
                    shared.model,
                    cache_dir=shared.cache_dir,
                    weights_bytes=shared.weights_bytes,
                )
            )
            sources.append(source)
            verifiers.append(LocalVerifier(source, config))
        async with Client(
            model=shared.model,
            bootstrap=(*addrs, *shared.bootstrap),
            policy=policy,
            host_config=replace(host_config, listen=()),
            cache_dir=shared.cache_dir,
            data_dir=shared.data_dir,
            weights_bytes=shared.weights_bytes,
            audit=config,
            verifier=verifiers[0],
        ) as client:
            if client.spec.revision != sources[0].spec.revision:
                raise ModelChanged(
                    f"{shared.model} has changed since this node started: its folder was written again; "
                    "this node audits no peers until it is started again"
                )
            yield client

    return IdleAudits(open_client, verify, report)


def draw_length(most: int, rng: random.Random) -> int:
    """Length of a text in tokens: random up to `most`, and enough for a verdict if that allows it.

    The last hop gives one output a token. The limits for a few are so wide that who is found to cheat in a
    longer text is merely suspect in a short one, if that much.
    """
    return rng.randint(max(most // 4, min(most, Thresholds().full_chunk)), most)


class LeastKnown(RoutingPolicy):
    """A random route over those whose integrity is shown least; over `own` only where nobody else serves."""

    def __init__(self, own: str, rng: random.Random) -> None:
        self._own = own
        self._rng = rng

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        """See `RoutingPolicy`."""

        def weigh(peer: Candidate, blocks: int) -> float:
            return 1.02 - view.score(peer.peer_id).integrity

        others = [peer for peer in candidates if peer.peer_id != self._own]
        try:
            return draw_routes(others, request, view, weigh, self._rng)
        except NoRoute:
            routes = draw_routes(candidates, request, view, weigh, self._rng)
            if set(routes[0].peer_ids) == {self._own}:
                raise  # there is nobody to check
            return routes
