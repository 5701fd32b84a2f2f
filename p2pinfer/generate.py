"""From a prompt to text: tokens, hidden states, a session, logits, a draw, text.

A session replaces hops that fail by itself. A generation holds everything that is needed to start over all
the same: the token ids so far. When its session is beyond repair it plans another route without the peers
that failed, pushes the ids through as one prefill and goes on. A draw depends on the seed and the position
alone, so the text is the one an undisturbed run would have given.

Where there is no other route it waits, first for news and then, ever more slowly, for those that failed to be
back. When its patience is at an end it raises `Unfinished`, whose token goes on from there, in any process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import msgspec
import trio
from torch import Tensor

from p2pinfer.errors import ConfigError, NoRoute, PeerError, PeerRefused, PromptTooLong, Unfinished
from p2pinfer.models.ends import Ends
from p2pinfer.models.sampling import Sampler, SamplingConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.spec import ModelSpec
from p2pinfer.models.text import StopMatcher, TextStream, Tokenizer
from p2pinfer.routing.route import Route, RouteOutcome

from .patience import Outage, Patience, Waiting
from .resume import GenerationState, check_state, encode_state
from .session import Session

logger = logging.getLogger(__name__)

FinishReason: TypeAlias = Literal["eos", "length", "stop"]


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """What to generate and how to draw it."""

    max_new_tokens: int = 128  # tokens
    temperature: float = 0.0  # 0 takes the likeliest token; higher is more varied
    top_p: float = 1.0  # draw among the likeliest tokens that together have this probability
    top_k: int = 0  # draw among this many likeliest tokens; 0 means all
    seed: int | None = None  # the same seed and prompt give the same text; None is fresh every time
    stop: tuple[str, ...] = ()  # the text ends before the first of these

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more")
        stop: object = self.stop
        if isinstance(stop, str):  # whose characters would each be a stop
            raise ConfigError(f"stop is the text {stop!r}; it must be a tuple of texts")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 63:
            raise ConfigError(f"seed is {self.seed}; it must fit into 64 bits")


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, and the text that became certain with it (often empty, never half a character)."""

    id: int
    text: str


@dataclass(frozen=True, slots=True)
class HopUsed:
    """A hop of the route a generation took."""

    peer_id: str
    span: BlockSpan
    connection: Literal["direct", "relayed"]


@dataclass(frozen=True, slots=True)
class Timings:
    """What a generation took. `per_hop_ms` is each hop's median time per decode step, its queue included."""

    first_token_s: float
    tokens_per_s: float  # after the first token
    per_hop_ms: tuple[float, ...]
    per_step_ms: float  # median decode step as the client saw it, network and all hops included


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A generation, whole or as far as it came."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason | None  # None: it is not finished
    route: tuple[HopUsed, ...]
    timings: Timings
    failovers: int


class Walker(Protocol):
    """Where a generation gets its sessions from: the client."""

    @property
    def table_changed(self) -> trio.Event:
        """Set with the next piece of news about who serves what."""
        ...

    async def open_session(self, tokens: int, excluded: frozenset[str]) -> Session:
        """A session for `tokens` positions on a route without the `excluded` peers; NoRoute if none."""
        ...

    def route_ended(self, route: Route, outcome: RouteOutcome) -> None:
        """Hear how a route fared."""
        ...

    def connection_kind(self, peer_id: str) -> Literal["direct", "relayed"]:
        """How this client is connected to a peer."""
        ...


def new_state(
    spec: ModelSpec, tokenizer: Tokenizer, prompt: str, config: GenerationConfig
) -> GenerationState:
    """What a generation that continues `prompt` begins with; where there is no seed, one is drawn.

    Raises:
        PromptTooLong: The prompt leaves no room in the model's context.
        ConfigError: The model cannot draw tokens like that.
    """
    prompt_ids = tuple(tokenizer.encode(prompt))
    room = spec.max_positions - len(prompt_ids)
    if room < 1:
        raise PromptTooLong(
            f"the prompt is {len(prompt_ids)} tokens long and {spec.model} takes "
            f"{spec.max_positions}, the answer included; shorten it"
        )
    if not prompt_ids:
        raise PromptTooLong("the prompt is empty and this model has no token to begin with; write something")
    sampling = SamplingConfig(config.temperature, config.top_p, config.top_k, config.seed)
    return GenerationState(
        spec.model,
        spec.revision,
        prompt_ids,
        min(config.max_new_tokens, room),
        config.temperature,
        config.top_p,
        config.top_k,
        Sampler(sampling).seed,
        config.stop,
    )


@dataclass(slots=True)
class _Clock:
    started: float | None = None  # when the first token was asked for
    first_token: float | None = None
    last_token: float | None = None

    def start(self) -> None:
        self.started = self.started or time.perf_counter()

    def tick(self) -> None:
        self.last_token = time.perf_counter()
        self.first_token = self.first_token or self.last_token


class Generation:
    """An asynchronous iterator of `Token`s. `result` tells what came of it, also before the end.

    Iterate to the end, or call `aclose`: until then hops keep cache reserved for it.
    """

    def __init__(
        self,
        walker: Walker,
        spec: ModelSpec,
        ends: Ends,
        tokenizer: Tokenizer,
        state: GenerationState,
        *,
        patience: Patience | None = None,
        on_wait: Callable[[Waiting], None] = lambda _: None,
    ) -> None:
        """Go on from `state`: that of `new_state`, or of a token.

        Raises:
            ConfigError: The state is of another model, or of none.
        """
        check_state(state, spec)
        self._walker = walker
        self._ends = ends
        self._tokenizer = tokenizer
        self._state = state
        self._patience = patience or Patience()
        self._on_wait = on_wait
        self._prompt_ids = state.prompt_ids
        self._max_new_tokens = state.max_new_tokens
        self._sampler = Sampler(SamplingConfig(state.temperature, state.top_p, state.top_k, state.seed))
        self._eos_ids = tokenizer.eos_ids
        self._text_stream = TextStream(tokenizer)
        self._stops = StopMatcher(state.stop)
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._finish_reason: FinishReason | None = None
        for token_id in state.token_ids:
            if self._finish_reason is None:
                self._text.append(self._take(token_id))
        self._session: Session | None = None
        self._session_began = (0.0, 0)  # when, and with how many tokens generated
        self._route: tuple[HopUsed, ...] = ()
        self._excluded: frozenset[str] = frozenset()
        self._failovers = 0
        self._per_hop_ms: tuple[float, ...] = ()
        self._per_step_ms = 0.0
        self._clock = _Clock()

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Token:
        """The next token.

        Raises:
            NoRoute: The swarm cannot serve this; `Unfinished`, if it could before.
            PeerError: Route after route failed, and none has given a token yet.
        """
        if self._finish_reason is not None:
            await self.aclose()
            raise StopAsyncIteration
        self._clock.start()
        try:
            token_id = await self._next_id()
        except BaseException:
            await self.aclose()
            raise
        self._clock.tick()
        token = Token(token_id, self._take(token_id))
        self._text.append(token.text)
        if self._finish_reason is not None:
            await self.aclose()
        return token

    async def _next_id(self) -> int:
        outage: Outage | None = None
        while True:
            changed = self._walker.table_changed
            try:
                hidden = await self._last_hidden()
            except (PeerError, NoRoute) as error:
                outage = outage or Outage(self._patience, begun=bool(self._token_ids))
                await self._get_over(error, outage, changed)
            else:
                return await trio.to_thread.run_sync(self._draw, hidden)

    async def _get_over(self, error: PeerError | NoRoute, outage: Outage, changed: trio.Event) -> None:
        """Return when there is something to be tried; raise when it has been long enough."""
        if isinstance(error, PeerError):
            await self._abandon(error)
            outage.note(error)
            if outage.may_try_on:
                return
            if not self._token_ids:
                raise error
        elif self._excluded and outage.may_forgive():
            self._excluded = frozenset()
            return
        if await outage.pause(error, changed, self._on_wait):
            self._excluded = frozenset()
            return
        reason, cause = outage.describe(error), outage.failure or error
        missing = error.missing if isinstance(error, NoRoute) else ()
        if self._token_ids and (token := self.resume_token):
            raise Unfinished(reason, missing, "".join(self._text), token) from cause
        if error is cause:
            raise error
        raise NoRoute(reason, missing) from cause

    async def _last_hidden(self) -> Tensor:
        """(1, hidden_size): the last position's hidden state after every block."""
        ids = (*self._prompt_ids, *self._token_ids)
        if self._session is None:
            self._session = await self._walker.open_session(
                len(self._prompt_ids) + self._max_new_tokens, self._excluded
            )
            self._session_began = (time.perf_counter(), len(self._token_ids))
            self._session.recall = self._recall
            self._note_route(self._session.route)
            embedded = await trio.to_thread.run_sync(self._ends.embed, ids)
            hidden = await self._session.prefill(embedded, 0)
        else:
            hidden = await self._session.decode(self._ends.embed(ids[-1:]), len(ids) - 1)
        self._note_route(self._session.route)
        return hidden

    def _recall(self, start: int, stop: int) -> Tensor:
        """What a session was given at past positions, (tokens, hidden_size)."""
        return self._ends.embed((*self._prompt_ids, *self._token_ids)[start:stop])

    def _note_route(self, route: Route) -> None:
        """Keep who takes part; hops may have been replaced."""
        if [(hop.peer_id, hop.span) for hop in route.hops] != [
            (hop.peer_id, hop.span) for hop in self._route
        ]:
            self._route = tuple(
                HopUsed(hop.peer_id, hop.span, self._walker.connection_kind(hop.peer_id))
                for hop in route.hops
            )

    def _draw(self, hidden: Tensor) -> int:
        position = len(self._prompt_ids) + len(self._token_ids)
        return self._sampler.pick(self._ends.logits(hidden)[-1], position)

    def _take(self, token_id: int) -> str:
        """Note a token and return the text that became certain with it."""
        self._token_ids.append(token_id)
        if token_id in self._eos_ids:
            self._finish_reason = "eos"
            certain = self._text_stream.finish()
        else:
            certain = self._text_stream.push(token_id)
            if len(self._token_ids) == self._max_new_tokens:
                self._finish_reason = "length"
                certain += self._text_stream.finish()
        text, stopped = self._stops.push(certain)
        if stopped:
            self._finish_reason = "stop"
        elif self._finish_reason is not None:
            text += self._stops.finish()
        return text

    async def _abandon(self, error: PeerError) -> None:
        """Give up the route and leave out who failed.

        Where nobody is known to have failed, the whole route is left out, and nobody's record suffers.
        """
        overslept = isinstance(error, PeerRefused) and error.code == "lease_expired"
        blamed = {error.peer_id} if error.peer_id else set[str]()
        if self._session is not None:
            self._failovers += not overslept
            blamed = blamed or set(self._session.route.peer_ids)
            blamed |= self._session.failed_peers
            self._settle(None if overslept else error)
            session, self._session = self._session, None
            await session.aclose()
        logger.info("%s: %s; trying another route", error.peer_id or "a peer", error)
        # Our reader paused for longer than the hops wait, or a hop has no room, which the client remembers.
        if not overslept and not (isinstance(error, PeerRefused) and error.is_passing):
            self._excluded |= blamed

    async def aclose(self) -> None:
        """Let the hops free what they hold for this generation; harmless twice."""
        if self._session is not None:
            session = self._session
            error: PeerError | None = None
            try:
                error = await session.settle()
            finally:  # cancelled: what was not checked is nobody's fault
                self._settle(error)
                self._session = None
                await session.aclose()

    def _settle(self, error: PeerError | None) -> None:
        """Tell the policy and the ledger how the route fared."""
        assert self._session is not None
        began_at, tokens_before = self._session_began
        outcome = RouteOutcome(
            ok=error is None,
            error=str(error) if error else None,
            failed_peer=(error.peer_id or None) if error else None,
            tokens=len(self._token_ids) - tokens_before,
            seconds=time.perf_counter() - began_at,
            per_hop_ms=self._session.per_hop_ms(),
        )
        self._per_hop_ms, self._per_step_ms = outcome.per_hop_ms, self._session.per_step_ms()
        self._failovers += self._session.failovers
        self._walker.route_ended(self._session.route, outcome)

    @property
    def prompt(self) -> str:
        """The text that is being continued, as the model sees it."""
        return self._tokenizer.decode(self._prompt_ids)

    @property
    def resume_token(self) -> str | None:
        """What `Client.resume` takes to go on from here, in any process; None if there is nothing left to do.

        It holds the prompt: keep it as safe as that.
        """
        if self._finish_reason is not None:
            return None
        return encode_state(msgspec.structs.replace(self._state, token_ids=tuple(self._token_ids)))

    @property
    def result(self) -> GenerationResult:
        """What has been generated; whole once the iteration has ended."""
        clock, session = self._clock, self._session
        first = clock.first_token or time.perf_counter()
        spent = (clock.last_token or first) - first
        per_hop = session.per_hop_ms() if session else self._per_hop_ms
        per_step = session.per_step_ms() if session else self._per_step_ms
        return GenerationResult(
            "".join(self._text),
            tuple(self._token_ids),
            len(self._prompt_ids),
            self._finish_reason,
            self._route,
            Timings(
                first - (clock.started or first),
                (len(self._token_ids) - len(self._state.token_ids) - 1) / spent if spent > 0 else 0.0,
                per_hop,
                per_step,
            ),
            self._failovers + (session.failovers if session else 0),
        )
