"""Generation of text from a prompt: tokens, hidden states, session, logits, draws.

A session replaces hops that fail by itself. A generation holds everything that is needed to start over all
the same: the token ids so far. When its session is beyond repair it plans another route without the peers
that failed, pushes the ids through as one prefill and goes on. A draw depends on the seed and the position
alone, so the text is the one an undisturbed run would have given.

Where there is no other route it waits, first for news and then, ever more slowly, for those that failed to be
back. When its patience is at an end it raises `Unfinished`, whose token goes on from there, in any process.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Final, cast

import trio

from p2pinfer.client_config import GenerationConfig as GenerationConfig
from p2pinfer.errors import NoRoute, PeerError, Unfinished
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.text.log_probabilities import LogProbabilities
from p2pinfer.models.text.text import Tokenizer
from p2pinfer.node.protocol.draws import Draw
from p2pinfer.session.terms import PLAIN, Packing

from .adapted_sessions import AdaptedSessions, AdaptingSource
from .drawn_ends import DrawnEnds, terms_of_draws
from .ends import Ends
from .first_state import generation_config as generation_config
from .first_state import new_state as new_state
from .kept_texts import KeptTexts
from .outage import Outage, RetryLimits, Waiting
from .remote_blocks import ExpectS, HopUsed, RemoteBlocks, SessionSource
from .saved_state import GenerationState, check_state
from .shared_prefill import SharedPrefill
from .speculation import Speculation, SpeculationStats
from .transcript import FinishReason, Transcript

if TYPE_CHECKING:
    from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead

    from .draft_model import DraftModel

_LAST_DRAWS: Final = 15  # whose median counts


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, and the text that became certain with it (often empty, never half a character)."""

    id: int
    text: str
    log_probabilities: LogProbabilities | None = None  # None: they were not asked for


@dataclass(frozen=True, slots=True)
class Timings:
    """Time that a generation took. `per_hop_ms`: each hop's median per decoded position, with its queue.

    `predicted_tokens_per_s` follows from what the planner knew of the hops before a token came, and from what
    was measured here: a draw, a guess, and how many guesses were right.
    """

    first_token_s: float
    tokens_per_s: float  # after the first token
    per_hop_ms: tuple[float, ...]
    per_step_ms: float  # the same as the client saw it, network and all hops included
    predicted_tokens_per_s: float | None = None  # None: nothing is known of a hop


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
    seed: int | None = None  # what its draws depend on; None if it is greedy
    speculation: SpeculationStats | None = None  # None: it was off
    stopped_by: str | None = None  # the stop text that ended it; None: another end
    reused_tokens: int = 0  # of the prompt: hops had them in their caches from an earlier text
    packed_tokens: int = 0  # of the prompt: their hidden states travelled packed


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

    Use as `async with client.generate(...) as generation`, iterate to the end, or call `aclose`: until then
    hops keep cache reserved for it. One that is dropped, by a `break` say, is closed soon after.

    Attributes:
        tokenizer: The model's.
    """

    def __init__(
        self,
        source: SessionSource,
        spec: ModelSpec,
        embedding_and_head: EmbeddingAndHead | None,
        tokenizer: Tokenizer,
        state: GenerationState,
        *,
        retry_limits: RetryLimits | None = None,
        speculation: Speculation | None = None,
        draft_model: DraftModel | None = None,
        expected_s: ExpectS = lambda _, __: None,
        logprobs: int | None = None,
        kept_texts: KeptTexts | None = None,
        packing: Packing = PLAIN,
        on_wait: Callable[[Waiting], None] = lambda _: None,
        on_dropped: Callable[[Callable[[], Awaitable[None]]], None] = lambda _: None,
    ) -> None:
        """Go on from `state`: that of `new_state`, or of a token.

        Args:
            embedding_and_head: Of the model; None if the first hop embeds, and the last one draws.
            speculation: Chooses guesses that are sent along; each token takes a trip of its own if None.
            draft_model: Draws guesses, beside those that are copied from the text.
            expected_s: Gives the seconds that a token should take over a route and its lines; None: unknown.
            logprobs: How many of the likeliest tokens' log probabilities to give with each; None: give none.
            kept_texts: Texts with whose beginning this one may begin on their hops, and to which it is added.
            packing: Positions that travel packed if the hops of the first session take that.
            on_dropped: Given what closes it, in any thread and at any time, if nobody holds it any more.

        Raises:
            ConfigError: The state is of another model, or of none; or a last hop cannot draw as it says.
        """
        check_state(state, spec)
        self._spec = spec
        self._retry_limits = retry_limits or RetryLimits()
        self._on_wait = on_wait
        self._seed = state.seed if state.temperature else None
        self.tokenizer = tokenizer
        self._transcript = transcript = Transcript(tokenizer, state)
        self._speculation = speculation
        if speculation is not None:
            speculation.end_ids = frozenset(transcript.eos_ids)
        self._ends: Ends
        draw: Draw | None = None
        if embedding_and_head is None:
            draw = terms_of_draws(state, transcript, logprobs)
            source = AdaptedSessions(cast(AdaptingSource, source), draw=draw)
            self._ends = DrawnEnds()
        else:
            from .local_ends import LocalEnds  # torch, which a client without weights never imports

            self._ends = ends = LocalEnds(embedding_and_head, spec, tokenizer, state, transcript, logprobs)
            if speculation is not None and draft_model is not None:
                speculation.drafter = ends.drafter(draft_model)
        self._source = source
        self._tokens_before = len(state.token_ids)
        self._remote = RemoteBlocks(source, self._ends, transcript, expected_s, kept_texts, draw, packing)
        self._guesses: tuple[int, ...] = ()  # to be sent with the next trip
        self._presumed = deque[int]()  # guesses that were sent, and not yet held against what was drawn
        self._follows = False  # the oldest window under way presumes what was drawn, and nothing else
        self._rows = deque[Any]()  # outputs that have come and are not used, by position
        self._clock = _Clock()
        self._draws_s = deque[float](maxlen=_LAST_DRAWS)
        self._changed: trio.Event | None = None  # set with news of the table since it was taken
        self._dropped = weakref.finalize(self, on_dropped, self._remote.aclose)
        self._dropped.atexit = False

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Token:
        """The next token.

        Raises:
            NoRoute: The swarm cannot serve this; `Unfinished`, if it could before.
            PeerError: Route after route failed, and none has given a token yet.
        """
        if self._transcript.finish_reason is not None:
            await self.aclose()
            raise StopAsyncIteration
        self._clock.start()
        try:
            token_id, logs = await self._next_id()
        except BaseException:
            self._rows.clear()  # the one that was in work is lost, and the others are of no use without it
            self._guesses = ()
            self._presume_nothing()
            await self.aclose()
            raise
        self._clock.tick()
        token = Token(token_id, self._transcript.take(token_id), logs)
        if self._transcript.finish_reason is not None:
            await self.aclose()
        return token

    async def _next_id(self) -> tuple[int, LogProbabilities | None]:
        outage: Outage | None = None
        while not self._rows:
            # Taken before the attempt, since news may come during it; and taken anew only once it is set.
            if (changed := self._changed) is None or changed.is_set():
                changed = self._changed = self._source.table_changed
            try:
                self._rows.extend(await self._trip())
            except (PeerError, NoRoute) as error:
                self._presume_nothing()
                outage = outage or Outage(self._retry_limits, begun=bool(self._transcript.token_ids))
                await self._get_over(error, outage, changed)
        return await trio.to_thread.run_sync(self._draw, self._rows.popleft())

    async def _trip(self) -> Sequence[Any]:
        """Outputs to draw the next token from, and those behind it, by position."""
        remote, speculation = self._remote, self._speculation
        if speculation is None:
            return self._ends.split((await remote.outputs_after()).outputs)
        if self._follows:
            trip = await remote.next_window(self._ahead)
            waits = speculation.windows
        else:
            self._presumed.extend(self._guesses)
            trip = await remote.outputs_after(self._guesses, self._ahead)
            waits = speculation.trips
        self._guesses, self._follows = (), False
        speculation.followed += trip.followers
        rows = self._ends.split(trip.outputs)
        if trip.seconds is None:  # the prefill of a session, without guesses
            self._presumed.clear()
        else:
            waits.append((len(rows), trip.seconds))
        return rows

    def _ahead(self, in_flight: int) -> tuple[int, ...]:
        """Guesses to send behind so many windows that are under way."""
        if self._speculation is None:
            return ()
        guesses = self._speculation.ahead(in_flight)
        self._presumed.extend(guesses)
        return guesses

    def _presume_nothing(self) -> None:
        self._presumed.clear()
        self._follows = False

    async def _get_over(self, error: PeerError | NoRoute, outage: Outage, changed: trio.Event) -> None:
        """Return when there is something to be tried; raise when it has been long enough."""
        if isinstance(error, PeerError):
            await self._remote.abandon(error)
            outage.note(error)
            if outage.may_try_on:
                return
            if not self._transcript.token_ids:
                raise error
        elif self._remote.excluded and outage.take_forgiveness():
            self._remote.forgive()
            return
        if await outage.pause(error, changed, self._on_wait):
            self._remote.forgive()
            return
        reason, cause = outage.describe(error), outage.failure or error
        missing = error.missing if isinstance(error, NoRoute) else ()
        if self._transcript.token_ids and (token := self.resume_token):
            raise Unfinished(reason, missing, self._transcript.text, token) from cause
        if error is cause:
            raise error
        raise NoRoute(reason, missing) from cause

    def _draw(self, output: Any) -> tuple[int, LogProbabilities | None]:
        """The next token. Runs in a thread: logits of a large vocabulary take milliseconds."""
        ids, started = self._transcript.ids, time.perf_counter()
        token_id, logs = self._ends.draw(output, ids)
        self._draws_s.append(time.perf_counter() - started)
        if (speculation := self._speculation) is not None:
            seen = speculation.seen
            if not seen:
                seen.update(ids)
            # Nothing has ever followed a token that is new to the text, so there is nothing to copy.
            if self._presumed or token_id in seen or speculation.drafter is not None:
                self._speculate(ids, token_id, speculation)
            seen.add(token_id)
        return token_id, logs

    def _speculate(self, ids: Sequence[int], token_id: int, speculation: Speculation) -> None:
        """Look whether what was sent presumes this token behind `ids`; if not, guess what follows."""
        if self._presumed:
            right = self._presumed.popleft() == token_id
            speculation.note_guess(right=right)
            if right:
                self._follows = not self._rows
                return
            self._presumed.clear()
            self._rows.clear()
        remote = self._remote
        # Less this token, and of the text's length less the one that the last output gives.
        room = min(remote.room - 1, self._transcript.max_ids - len(ids) - 2)
        self._guesses = speculation.guess(
            ids,
            token_id,
            max(0, room),
            remote.compute_s,
            expected_s=remote.expected_s,
            at_once=remote.at_once,
        )

    async def aclose(self) -> None:
        """Let the hops free what they hold for this generation; harmless twice."""
        if self._speculation is not None:
            self._speculation.end()
        await self._remote.aclose()
        self._dropped.detach()

    def share_prefill(self, *others: Generation) -> None:
        """Have the prompt computed once for this and for others, of one client and with the same prompt.

        To be called before any of them begins. They may run at once, each by its own settings and seed.
        """
        shared = SharedPrefill()
        for each in (self, *others):
            each._remote.shared = shared

    @property
    def prompt(self) -> str:
        """The text that is being continued, as the model sees it."""
        return self._transcript.prompt

    @property
    def resume_token(self) -> str | None:
        """Token for `Client.resume` to go on from here, in any process; None if there is no more to come.

        There is after `max_new_tokens`, while the model's context has room. It holds the prompt: keep it as
        safe as that.
        """
        has_room = len(self._transcript.ids) < self._spec.max_positions
        return self._transcript.resume_token if has_room else None

    @property
    def is_cut(self) -> bool:
        """True if it ended for want of tokens that it may have, or of room in the model's context."""
        return self._transcript.finish_reason == "length"

    @property
    def result(self) -> GenerationResult:
        """Result so far; whole once the iteration has ended."""
        clock, transcript, remote = self._clock, self._transcript, self._remote
        first = clock.first_token or time.perf_counter()
        spent = (clock.last_token or first) - first
        drawn = len(transcript.token_ids) - self._tokens_before
        return GenerationResult(
            transcript.text,
            tuple(transcript.token_ids),
            len(transcript.prompt_ids),
            transcript.finish_reason,
            remote.route,
            Timings(
                first - (clock.started or first),
                (drawn - 1) / spent if spent > 0 else 0.0,
                remote.per_hop_ms,
                remote.per_step_ms,
                self._predicted_tokens_per_s(drawn),
            ),
            remote.failovers,
            self._seed,
            self._speculation.stats(drawn) if self._speculation else None,
            transcript.stopped_by,
            remote.reused_tokens,
            transcript.packed or 0,
        )

    def _predicted_tokens_per_s(self, drawn: int) -> float | None:
        """Tokens a second that were to be expected of the last route, `drawn` being those that came."""
        if (trip_s := self._remote.expected_s) is None or not self._draws_s:
            return None
        tokens = 1.0
        if self._speculation is not None:
            tokens = self._speculation.stats(drawn).tokens_per_trip
            trip_s += self._speculation.seconds_of_guesses
        return tokens / (trip_s + tokens * median(self._draws_s))
