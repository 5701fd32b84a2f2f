"""Client: joins the swarm without serving, plans routes and opens sessions.

The client keeps the same live table as a node, from the same gossip, so a generation starts with a look at
memory. What it learns from a route's fate goes to its ledger and to the policy that chose it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Unpack

import trio

from p2pinfer.audit.tally import AuditTally
from p2pinfer.audit.verifier import Verifier
from p2pinfer.generation.adapted_sessions import AdaptedSessions
from p2pinfer.generation.first_state import check_lengths, packing_of
from p2pinfer.generation.generation import Generation, generation_config, new_state
from p2pinfer.generation.kept_texts import KeptTexts
from p2pinfer.generation.outage import RetryLimits, Waiting
from p2pinfer.generation.saved_state import GenerationState, decode_state, extend_state
from p2pinfer.generation.speculation import speculation_by
from p2pinfer.learning.loaded_adapters import LoadedAdapters
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL, resolve_model
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.progress import Progress
from p2pinfer.models.text.chat_template import ChatPrompt, ChatTemplate
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.protocol.draws import Draw
from p2pinfer.node.swarm.membership import SwarmMember, open_swarm
from p2pinfer.node.transport.identity import Identity, client_identity
from p2pinfer.planning.ledger_sync import kept_ledger
from p2pinfer.planning.opening_race import OpeningRace
from p2pinfer.planning.policy_runner import PolicyRunner
from p2pinfer.planning.prefix_opener import PrefixOpener
from p2pinfer.planning.reachable_routes import ReachableRoutes
from p2pinfer.planning.route_planner import RoutePlanner
from p2pinfer.planning.session_opener import SessionOpener
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.routing.config import RoutingConfig
from p2pinfer.routing.policy import DEFAULT_POLICY, RoutingPolicy, load_policy
from p2pinfer.routing.route import Route, RouteOutcome
from p2pinfer.session.chain import ReplaySource
from p2pinfer.session.session import Session
from p2pinfer.session.terms import PLAIN, Packing, SessionAdapter

from .client_config import AuditConfig, GenerationConfig, SessionConfig, TuneConfig
from .client_config import ClientConfig as ClientConfig
from .errors import LocalError
from .events import Report, guarded
from .folders import cache_folder, data_folder, expand
from .local_model import load_local_model, settled
from .options import GenerationOptions, addresses_of, check_arguments, check_loop, check_prompt, suggesting
from .served import joining_options
from .swarm_view import PeerView as PeerView
from .swarm_view import peers_serving

if TYPE_CHECKING:  # torch, which a client without weights never imports
    from p2pinfer.audit.auditor import Auditor
    from p2pinfer.learning.pass_watch import PassWatch
    from p2pinfer.learning.tuner import Tuner
    from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead

logger = logging.getLogger(__name__)


class Client:
    """Generates text on a swarm. Use as `async with Client(...) as client`.

    Args:
        model: A folder, GGUF file or hub id (`owner/name` or `owner/name@branch`); else the bundled one.
        bootstrap: Multiaddrs to join by, or one of them; those of bootstrap_peers.txt if empty.
        policy: A built-in policy's name, `module:Class`, or a `RoutingPolicy`; that of `config` if None.
        config: How it finds its way, and where embedding and head are computed.
        host_config: Who may connect, time limits, a private swarm's key; by default it does not listen.
        session_config: How prompts are cut, and how long hops may take.
        routing_config: What the built-in policies weigh by.
        reputation: What is known of peers, kept by whoever passes it; that of `data_dir` by default.
        cache_dir: Where downloaded models are kept; by default in the user's cache folder.
        data_dir: Where the ledger and kept texts are; by default the user's data folder.
        weights_bytes: Disk that downloaded models may take there, bytes; 0: whatever is free.
        progress: Told of downloads and hashing.
        on_wait: Called when a text cannot go on at the moment, with what it waits for.
        audit: How often peers are checked, and what that may take.
        verifier: Who says whether a peer's output is right; by default, its blocks run again here.
        identity: Lasting peer id, or its file, made on first use; else a new one (`config.identity_file`).
        on_event: Called with every event of `p2pinfer.events`: routes, steps, failed hops, audits.

    Raises:
        PolicyError: There is no such policy.
        TypeError: There is no such argument, or one is of another type; the message says what there is.

    Raises (on entering):
        LocalError: There is no trio loop, but that of asyncio, say; `connect` needs none.
        ModelNotFound, CheckpointError: The model cannot be opened.
        ConfigError: A bootstrap address is malformed.
    """

    @suggesting
    def __init__(
        self,
        *,
        model: str | Path = BUNDLED_MODEL,
        bootstrap: str | Sequence[str] = (),
        policy: str | RoutingPolicy | None = None,
        config: ClientConfig | None = None,
        host_config: HostConfig | None = None,
        session_config: SessionConfig | None = None,
        routing_config: RoutingConfig | None = None,
        reputation: Ledger | None = None,
        cache_dir: str | Path | None = None,
        data_dir: str | Path | None = None,
        weights_bytes: int = 0,
        progress: Progress | None = None,
        on_wait: Callable[[Waiting], None] = lambda _: None,
        audit: AuditConfig | None = None,
        verifier: Verifier | None = None,
        identity: str | Path | Identity | None = None,
        on_event: Report | None = None,
    ) -> None:
        self.ledger = reputation or Ledger()
        self._keeps_ledger = reputation is None
        self._config = config or ClientConfig()
        policy = policy or self._config.policy
        self.policy = load_policy(policy, config=routing_config) if isinstance(policy, str) else policy
        fallback = load_policy(DEFAULT_POLICY, config=routing_config)
        self._policy_runner = PolicyRunner(self.policy, fallback, self._config.policy_timeout_s)
        self.model = str(model)  # as it was asked for
        self._bootstrap = addresses_of(bootstrap)
        self._host_config = host_config or HostConfig(listen=())
        self._session_config = session_config or SessionConfig()
        self.cache_dir = expand(cache_dir) if cache_dir else cache_folder()  # models, hashes of files
        self._data_dir = expand(data_dir) if data_dir else data_folder()
        self._weights_bytes = weights_bytes
        self._progress = progress
        self._on_wait = on_wait
        self._routing_config = routing_config
        self._audit_config = audit or AuditConfig()
        self._verifier = verifier
        self._identity = identity
        self._report = guarded(on_event) if on_event is not None else None
        self._auditor: Auditor | None = None
        self.training_watch: PassWatch | None = None  # of all trainers
        self._stack = AsyncExitStack()
        self._is_open = False
        self.adapters = LoadedAdapters()

    async def __aenter__(self) -> Client:
        check_loop()
        async with AsyncExitStack() as stack:
            # Abandoned, since a Ctrl-C must not wait until gigabytes have come.
            folder, limit = self.cache_dir, self._weights_bytes
            resolve = partial(resolve_model, cache_dir=folder, weights_bytes=limit, progress=self._progress)
            self._source = await trio.to_thread.run_sync(resolve, self.model, abandon_on_cancel=True)
            given = self._config.identity_file if self._identity is None else self._identity
            identity = await trio.to_thread.run_sync(client_identity, given)
            self._config = settled(self._config, self.spec)
            if self._keeps_ledger:
                self.ledger = await stack.enter_async_context(kept_ledger(self._data_dir))
            self._member = await stack.enter_async_context(
                open_swarm(identity, self._host_config, self._bootstrap, self._data_dir)
            )
            await self._member.join(self._source.spec.revision)
            self._planner = RoutePlanner(
                self._member,
                self.spec,
                self.ledger,
                self._policy_runner,
                self._config.busy_pause_s,
                self._routing_config,
                joining=joining_options(self._bootstrap, self._host_config.swarm_key),
                model=self.model,
                is_thin=self._config.thin == "on",
                packs=self._config.prefill_codec != "off",
            )
            self.routes = ReachableRoutes(self._planner, self._member, self.spec)
            self._race = OpeningRace(self.routes, self.ledger)
            self._nursery = await stack.enter_async_context(open_nursery())
            self._nursery.start_soon(self._policy_runner.deliver_outcomes)
            stack.push_async_callback(self._policy_runner.finish)
            if self._config.thin == "off" or self._verifier is not None:
                from p2pinfer.audit.auditor import open_auditor  # torch
                from p2pinfer.learning.second_pass import run_pass_elsewhere

                parts = self._member, self._source, self.ledger, self._verifier, self._audit_config
                host, kept_in = self._host_config, self._data_dir if self._keeps_ledger else None
                again, blame = partial(run_pass_elsewhere, spec=self.spec), self._planner.blame
                known = self.adapters.find
                self._auditor = open_auditor(*parts, host, self._report, kept_in, blame, again, known)
                self._nursery.start_soon(self._auditor.serve)
                self.training_watch = self._auditor.training
            shared = self._member.host, self._nursery, self.spec, self._session_config, self.routes
            self._opener = SessionOpener(*shared, self._auditor, self._report)
            self._kept_texts = KeptTexts(PrefixOpener(self._planner, self._opener).open)
            load = partial(load_local_model, self._source, self._config, self._progress, resolve)
            self.local = await trio.to_thread.run_sync(load, abandon_on_cancel=True)
            self._token = trio.lowlevel.current_trio_token()
            self._is_open = True
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self._is_open:  # else nobody is left to check anything
            await self.audits_settled()
        self._is_open = False
        await self._stack.__aexit__(kind, error, traceback)

    @property
    def audits(self) -> AuditTally:
        """Results of this client's audits so far."""
        return self._auditor.tally if self._auditor else AuditTally()

    async def audits_settled(self) -> None:
        """Wait until the sessions that were closed are checked as far as they are going to be."""
        if self._auditor is not None:
            await self._auditor.linger(self._audit_config.linger_s)

    @property
    def member(self) -> SwarmMember:
        """Membership of this client in the swarm: its host, its table."""
        return self._member

    @property
    def chat_template(self) -> ChatTemplate | None:
        """Chat template of the model, which writes a conversation as a prompt; None if it has none."""
        return self.local.chat_template

    def generate(
        self,
        prompt: str | ChatPrompt,
        config: GenerationConfig | None = None,
        *,
        adapter: SessionAdapter | None = None,
        **overrides: Unpack[GenerationOptions],
    ) -> Generation:
        """Continue `prompt`, a text or what `chat_template` made of a conversation.

        Args:
            config: What to generate; the defaults of `GenerationConfig` otherwise.
            adapter: Tunes the model for this text; from `load_adapter`.
            overrides: Single fields of it, such as `max_new_tokens=50`.

        Raises:
            PromptTooLong: The prompt does not fit the model.
            TypeError: The prompt is not one text, or `config` no `GenerationConfig`.
            ConfigError: No such override, a value that makes no sense, or nothing to begin a text with.
        """
        check_prompt(prompt)
        check_arguments(generation_config=config)
        if not hasattr(self, "local"):
            raise LocalError("this client is not open yet: async with p2pinfer.Client(...) as client")
        asked = generation_config(config, overrides)
        state = new_state(self.spec, self.local.tokenizer, prompt, asked, self.local.defaults)
        return self._go_on(state, adapter, asked.logprobs)

    def resume(
        self, token: str, max_new_tokens: int | None = None, adapter: SessionAdapter | None = None
    ) -> Generation:
        """Go on with a generation that could not, or that was left, from its `resume_token`.

        Its `result` holds all of the text; iterating gives the tokens that are still to come.

        Args:
            max_new_tokens: How many more; None: those that were left, or 128 where none were.
            adapter: That of the text so far, which a token does not hold.

        Raises:
            ConfigError: It is no resume token, or one of other weights.
            TypeError: It is no text.
        """
        check_arguments(token=token)
        GenerationConfig(max_new_tokens=max_new_tokens)  # which says what is wrong with a number
        state = extend_state(decode_state(token), max_new_tokens, self.spec.max_positions)
        return self._go_on(state, adapter, None)

    def tuner(self, config: TuneConfig | None = None) -> AbstractAsyncContextManager[Tuner]:
        """A `Tuner` of this client's model for as long as the block runs; see docs/learning.md."""
        from p2pinfer.learning.tuning import tuner_over

        parts = self._member.host, self.ends, self.local.tokenizer, self.routes
        asked, watch = config or TuneConfig(), self.training_watch
        return tuner_over(*parts, lambda: self.table_changed, asked, watch=watch)

    async def load_adapter(self, folder: str | Path) -> SessionAdapter:
        """LoRA for `generate`: a folder of peft's files, or the id or name of one that a node offers.

        A ConfigError says that it is no LoRA, for another model, or offered by nobody.
        """
        return await self.adapters.load(folder, self.ends, self._member)

    def _go_on(self, state: GenerationState, adapter: SessionAdapter | None, logs: int | None) -> Generation:
        config, local = self._config, self.local
        return Generation(
            self if adapter is None else AdaptedSessions(self, adapter),
            self.spec,
            local.embedding_and_head,
            local.tokenizer,
            state,
            retry_limits=RetryLimits(config.find_timeout_s, config.wait_s, config.max_attempts),
            speculation=speculation_by(config.speculate, local.crowd),
            draft_model=local.draft_model,
            expected_s=self._planner.expected_s,
            logprobs=logs,
            kept_texts=self._kept_texts if adapter is None else None,
            packing=packing_of(state, config.prefill_codec),
            on_wait=self._on_wait,
            on_dropped=self._close_soon,
        )

    def _close_soon(self, close: Callable[[], Awaitable[None]]) -> None:
        """Called by finalizers, so in any thread and between any two instructions."""

        def begin() -> None:
            if self._is_open:  # else everything is being closed anyway
                self._nursery.start_soon(close)

        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(begin)

    async def is_served(self, timeout_s: float) -> bool:
        """True if anybody serves this client's model; waits for news of that for so long."""
        with trio.move_on_after(timeout_s):
            while not self.peers():
                await self._member.table_changed.wait()
        return bool(self.peers())

    def others_served(self) -> str:
        """Other models that are served here, and how to ask for one; empty if there are none."""
        return self._planner.others_served()

    def peers(self) -> list[PeerView]:
        """Peers known to serve this client's model."""
        return peers_serving(self._member, self.spec.revision)

    async def keep_no_record(self, vouched: Sequence[str] = ()) -> None:
        """Learn into memory only: the peers are our own and end with us. A ledger that was passed is left.

        The integrity of `vouched` ones is taken for granted.
        """
        if self._auditor is not None:
            await self._auditor.keep_nothing()
        if self._keeps_ledger:
            await trio.to_thread.run_sync(self.ledger.detach)
            for peer_id in vouched:
                self.ledger.vouch(peer_id)

    @property
    def ends(self) -> EmbeddingAndHead:
        """Embedding and head, which run here; LocalError if this client holds no weights."""
        return self.local.ends

    @property
    def spec(self) -> ModelSpec:
        """The model this client talks about."""
        return self._source.spec

    @property
    def table_changed(self) -> trio.Event:
        """Set with the next piece of news about who serves what."""
        return self._member.table_changed

    async def open_session(
        self,
        tokens: int,
        excluded: frozenset[str],
        replay_source: ReplaySource | None = None,
        adapter: SessionAdapter | None = None,
        draw: Draw | None = None,
        packing: Packing = PLAIN,
    ) -> Session:
        """A session for `tokens` positions on the best route that is there, without the `excluded`.

        Args:
            replay_source: What went in at past positions; with it the first hop can be replaced too.
            adapter: For every hop; `draw`: how the last one draws; `packing`: what is to travel packed.

        Raises:
            PromptTooLong: The model's context is shorter. `check_lengths` tells of a prompt's own limit.
            NoRoute: Nobody serves some of the blocks.
            PeerError: A hop of the route could not be reached or refused.
        """
        check_lengths(self.spec, tokens)
        open_on, terms = self._opener.open_on, (replay_source, adapter, draw, None, packing)
        return await self._race.open(tokens, excluded, lambda plan: open_on(plan, tokens, excluded, *terms))

    def route_ended(self, route: Route, outcome: RouteOutcome) -> None:
        """Note how a route fared."""
        self._planner.route_ended(route, outcome)

    def connection_kind(self, peer_id: str) -> Literal["direct", "relayed"]:
        """Kind of this client's connection to a hop."""
        return self._member.host.connection_kind(peer_id) or "direct"
