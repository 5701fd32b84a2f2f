"""Idle-time audits of a node: it checks others while it has nothing to serve (`--verify`).

    nobody is served -> a client under a throw-away identity -> texts over peers known least -> audits
         ^                                                                                        |
         '----------------- a pause, so long that the whole takes `share` of the time <-----------'

To the peers it is a client like any other. Its sessions have the shapes of those that clients open here. Its
prompts are of texts that the operator or the model has written (`p2pinfer/audit/traffic.py`). Its identity is
new or has been about for hours, as clients' are, and audits no hop more often than theirs do. Every hop is
audited, and what can be proved is published. As soon as somebody wants something of this node, the round is
given up.
"""

from __future__ import annotations

import logging
import random
import string
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import trio

from p2pinfer.audit.local_verifier import LocalVerifier
from p2pinfer.audit.traffic import SessionShapes, Texts
from p2pinfer.audit.verifier import Verifier
from p2pinfer.models.checkpoint.source import ModelSource, resolve_model
from p2pinfer.node.concurrency.pulse import Pulse
from p2pinfer.node.events import Event, Ready, SessionClosed, SessionOpened, Verified
from p2pinfer.node.host_config import HostConfig, dialling_only
from p2pinfer.node.transport.identity import Identity, new_identity
from p2pinfer.reputation.view import ReputationView
from p2pinfer.routing.drawing import draw_routes
from p2pinfer.routing.policy import RoutingPolicy
from p2pinfer.routing.route import Candidate, Route, RouteRequest

from .client import Client
from .client_config import AuditConfig, ClientConfig, GenerationConfig
from .client_config import VerifyConfig as VerifyConfig
from .config import SharedConfig
from .errors import ConfigError, ModelChanged, NoRoute, P2PInferError
from .text_files import decode_text

logger = logging.getLogger(__name__)

SEEN_BEFORE: Final = 0.1  # chance of a peer that knows where a prompt comes from, relative to others
OWN_CHANCE: Final = 1e-6  # of this node itself, which is to help out where nobody else serves
THIN: Final = 0.25  # of the rounds are clients without weights
LASTS: Final = 0.5  # of the identities may make another round
RETURNS: Final = 0.25  # of the rounds are by such an identity, if there is one
IDENTITY_S: Final = 6 * 3600.0  # for which such an identity lasts, on average


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
        self._shapes = SessionShapes()
        self._texts: Texts | None = None

    def note(self, event: Event) -> None:
        """Take in what the node does."""
        match event:
            case Ready():
                self._node = event
            case SessionOpened(peer_id=client, sessions=sessions):
                self._sessions = sessions
                if client != self._client_id:
                    self._shapes.note_opened(client, event.max_tokens)
                    self._round.cancel()
            case SessionClosed(peer_id=client, sessions=sessions):
                self._sessions = sessions
                self._shapes.note_closed(client, event.tokens)
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
                    await self._make_text(client, policy)
                await client.audits_settled()
                tally = client.audits
        except ModelChanged as exc:
            logger.warning("%s", exc)
        except P2PInferError as exc:  # nobody there, say
            logger.debug("idle_audits.failed why=%s", exc)
        except Exception:  # what checks others must not end the node that serves
            logger.exception("a round of audits ended in an error of our own")
        else:
            self._report(Verified(tally.done, tally.passed, tally.failed, tally.suspect))
        finally:
            self._client_id = ""

    async def _make_text(self, client: Client, policy: LeastKnown) -> None:
        rng, most = self._rng, client.spec.max_positions
        if self._texts is None:
            self._texts = Texts(await trio.to_thread.run_sync(read_texts, self._config.prompts))
        shape = self._shapes.draw(self._config.max_new_tokens, rng)
        prompt, policy.readers = self._texts.draw(min(shape.prompt, most // 4), rng)
        config = GenerationConfig(
            max_new_tokens=min(shape.asked, most // 4),
            temperature=0.8 if prompt else 1.0,  # the first texts are all that later ones come from
            seed=rng.getrandbits(60),
        )
        try:
            generation = client.generate(prompt, config)
        except ConfigError:  # the model has no token to begin a text with
            generation = client.generate(rng.choice(string.ascii_letters), config)
        new = 0
        try:
            async for _ in generation:
                new += 1
                if new >= shape.new:
                    break
        finally:
            await generation.aclose()
        readers = tuple(hop.peer_id for hop in generation.result.route)
        self._texts.add(f"{prompt}{generation.result.text}", (*readers, *policy.readers))


def read_texts(path: Path | None) -> list[str]:
    """Texts of a file, one a paragraph; none, and a warning, where it cannot be read."""
    if path is None:
        return []
    try:
        return decode_text(path.expanduser().read_bytes()).split("\n\n")
    except (OSError, UnicodeError) as exc:
        logger.warning("no prompts can be read from %s: %s; the model's own texts are used", path, exc)
        return []


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
    rng = random.SystemRandom()
    identities = Identities(rng)

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
        # Hops at the model's ends embed and draw for some clients, which cannot look at that themselves.
        thin = "on" if rng.random() < THIN else "off"
        async with Client(
            model=shared.model,
            config=ClientConfig(thin=thin),
            bootstrap=(*addrs, *shared.bootstrap),
            policy=policy,
            host_config=dialling_only(host_config),
            identity=identities.current(trio.current_time()),
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


class Identities:
    """Identities of the rounds: new, as a command line's are, or one of before, as a service's are.

    An identity makes two rounds at most. A client audits a peer in all of its first sessions with it and
    seldom later; one that audited it in every session for hours would be known for what it is.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._waiting: list[tuple[float, Identity]] = []  # that have made one round, and until when they last

    def current(self, now: float) -> Identity:
        """Identity of the round that begins at `now`, in seconds."""
        self._waiting = [each for each in self._waiting if now < each[0]]
        if self._waiting and self._rng.random() < RETURNS:
            return self._waiting.pop(self._rng.randrange(len(self._waiting)))[1]
        identity = new_identity()
        if self._rng.random() < LASTS:
            self._waiting.append((now + self._rng.expovariate(1 / IDENTITY_S), identity))
        return identity


class LeastKnown(RoutingPolicy):
    """A random route over those whose integrity is shown least; over `own` only where nobody else serves.

    Attributes:
        readers: Peers that have seen where the next prompt comes from, and could know it again.
    """

    def __init__(self, own: str, rng: random.Random) -> None:
        self.readers: frozenset[str] = frozenset()
        self._own = own
        self._rng = rng

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        """See `RoutingPolicy`."""

        def weigh(peer: Candidate, blocks: int) -> float:
            if peer.peer_id == self._own:
                return OWN_CHANCE
            known = SEEN_BEFORE if peer.peer_id in self.readers else 1.0
            return known * (1.02 - view.score(peer.peer_id).integrity)

        others = [peer for peer in candidates if peer.peer_id != self._own]
        try:
            return draw_routes(others, request, view, weigh, self._rng)
        except NoRoute:
            routes = draw_routes(candidates, request, view, weigh, self._rng)
            if set(routes[0].peer_ids) == {self._own}:
                raise  # there is nobody to check
            return routes
