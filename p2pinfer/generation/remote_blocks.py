"""Blocks of a generation that peers compute: a session, and another one if it is beyond repair.

Another route leaves out the peers that failed, until they are forgiven, and its session is given all tokens
so far as one prefill.

A session reserves room on every hop for all it may ever hold. A text that may become long begins with a part
of that, or with what there is room for, and takes another session when that is used up, for twice as much: so
all prefills together are about as long as the text. It holds nothing while it asks for more, so two texts
cannot wait for each other's room.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, Protocol, TypeAlias

import trio

from p2pinfer.errors import NoRoute, PeerError, PeerRefused
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.draws import Draw
from p2pinfer.routing.route import Route, RouteOutcome
from p2pinfer.session.chain import ReplaySource
from p2pinfer.session.session import Session
from p2pinfer.session.terms import PLAIN, Inputs, Packing

from .ends import Ends
from .kept_texts import LEAST_TOKENS, KeptTexts, common_length, kept_s
from .shared_prefill import SharedPrefill, keep_beginning
from .transcript import Transcript
from .windows import MOST_UNDER_WAY, Ahead, Windows

logger = logging.getLogger(__name__)

_AHEAD_TOKENS: Final = 2048  # reserved ahead of a text, or as many as it is long
_GROWTH_TOKENS: Final = 64  # a session that adds fewer to a text is not worth its prefill


@dataclass(frozen=True, slots=True)
class Trip:
    """Result of one way through all hops.

    Attributes:
        outputs: Of the last token, and of the guesses behind it: what `Ends.split` takes apart.
        seconds: Time it took; None if it was the prefill of a session, which takes no guesses.
        followers: Number of windows still under way behind it.
    """

    outputs: Any
    seconds: float | None
    followers: int = 0


@dataclass(frozen=True, slots=True)
class HopUsed:
    """A hop of the route a generation took."""

    peer_id: str
    span: BlockSpan
    connection: Literal["direct", "relayed"]


# Seconds that a token should take over a route, given the round trips of its lines; None if nobody can tell.
ExpectS: TypeAlias = Callable[[Route, Sequence[float]], float | None]


class SessionSource(Protocol):
    """Source of a generation's sessions: the client."""

    @property
    def table_changed(self) -> trio.Event:
        """Set with the next piece of news about who serves what."""
        ...

    async def open_session(
        self,
        tokens: int,
        excluded: frozenset[str],
        replay_source: ReplaySource,
        *,
        packing: Packing = PLAIN,
    ) -> Session:
        """A session for `tokens` positions on a route without the `excluded` peers; NoRoute if none.

        `replay_source` gives what went in at past positions, of which those of `packing` travel packed.
        """
        ...

    def route_ended(self, route: Route, outcome: RouteOutcome) -> None:
        """Hear how a route fared."""
        ...

    def connection_kind(self, peer_id: str) -> Literal["direct", "relayed"]:
        """Kind of this client's connection to a peer."""
        ...


class RemoteBlocks:
    """Takes a transcript's tokens through every block. Close it with `aclose`.

    Attributes:
        route: The hops of the last session.
        excluded: Who is left out of the next one.
        expected_s: Seconds that a token was expected to take over these hops; None if nobody can tell.
        reused_tokens: Tokens that hops had in their caches already, in the first session.
        at_once: Most guesses in one step, by what the hops take.
        shared: Prefill that is shared with other texts of this prompt; None: it has its own.
    """

    def __init__(
        self,
        source: SessionSource,
        ends: Ends,
        transcript: Transcript,
        expect_s: ExpectS = lambda _, __: None,
        kept_texts: KeptTexts | None = None,
        draw: Draw | None = None,
        packing: Packing = PLAIN,
    ) -> None:
        """Begin sessions with those of `kept_texts`, and add to them, if there are any.

        `draw` has the terms of the last hop's draws, by which `source` opens all sessions, if it draws. What
        the first session makes of `packing` goes for the others too.
        """
        self._packing = packing
        self.route: tuple[HopUsed, ...] = ()
        self.excluded: frozenset[str] = frozenset()
        self.expected_s: float | None = None
        self.reused_tokens = 0
        self._kept_texts = kept_texts
        self._draw = draw
        self.shared: SharedPrefill | None = None
        self._expect_s = expect_s
        self._accused: dict[str, set[str]] = {}  # by who complained: of which neighbours
        self._source = source
        self._ends = ends
        self._transcript = transcript
        self._session: Session | None = None
        self._noted: Route | None = None  # what `route` was made from
        self._reserved = 0  # tokens that the session has room for
        self.at_once = 0
        self._windows = Windows()
        self._began_at = 0.0  # the session
        self._tokens_before = 0
        # Of the sessions that are over:
        self._failovers = 0
        self._per_hop_ms: tuple[float, ...] = ()
        self._per_step_ms = 0.0

    @property
    def room(self) -> int:
        """Number of guesses behind the tokens so far that the session has positions for; 0 without one."""
        return 0 if self._session is None else max(0, self._reserved - len(self._transcript.ids))

    async def outputs_after(self, guesses: tuple[int, ...] = (), ahead: Ahead = lambda _: ()) -> Trip:
        """Outputs at the last token, and at guesses at those that follow it.

        Args:
            guesses: At most as many as there is `room`; left out where a session has to be opened first.
            ahead: Gives what to send behind them. Windows that were sent before are dropped.

        Raises:
            NoRoute: There is no route without those that are excluded.
            PeerError: A session could not be opened, or is beyond repair; `abandon` it.
        """
        ids = self._transcript.ids
        # Ended before the next one is asked for. Holding one while asking for another would be quicker where
        # there is room, and where there is none two texts could wait for each other for ever.
        if self._session is not None and len(ids) > self._reserved:
            await self.aclose()
        if self._session is None:
            self._session = await self._open()
            self._note_packed(self._session)
            self._windows.forget()
            self._began_at, self._tokens_before = time.perf_counter(), len(self._transcript.token_ids)
            self._note_route(self._session)
            self._windows.sent = (len(ids), ())
            embedded = await trio.to_thread.run_sync(self._ends.embed, ids)
            kept = self._session.chain.prefix
            self.reused_tokens = self.reused_tokens or kept
            trip = Trip(await self._session.prefill(embedded, 0, kept=kept), None)
        else:
            if self._windows.under_way:  # plainly read, for tokens that have nothing to do with them
                await self._windows.drop(self._session, len(ids) - 1)
            started = time.perf_counter()
            self._windows.sent = (len(ids), guesses)
            embedded = self._ends.embed((ids[-1], *guesses))
            meanwhile = partial(self._windows.follow, self._session, self._ends, ahead) if guesses else None
            outputs = await self._session.decode(embedded, len(ids) - 1, meanwhile)
            trip = Trip(outputs, time.perf_counter() - started, len(self._windows.under_way))
        if self._session.chain.route is not self._noted:
            self._note_route(self._session)
        return trip

    async def next_window(self, ahead: Ahead) -> Trip:
        """Outputs of the oldest window under way, whose guesses have all turned out right so far.

        Args:
            ahead: Gives what to send behind those that are under way.

        Raises:
            PeerError: The session is beyond repair; `abandon` it.
        """
        session = self._session
        assert session is not None
        await self._windows.follow(session, self._ends, ahead)
        started = time.perf_counter()
        outputs = await self._windows.next()
        trip = Trip(outputs, time.perf_counter() - started, len(self._windows.under_way))
        if session.chain.route is not self._noted:
            self._note_route(session)
        return trip

    async def _open(self) -> Session:
        """A session that has room for the tokens so far and for as many to come as can be had."""
        have, most = len(self._transcript.ids), self._transcript.max_ids
        least = min(most, have + _GROWTH_TOKENS)
        tokens = min(most, have + max(_AHEAD_TOKENS, have))
        while True:
            try:
                session = await self._open_for(tokens)
            except NoRoute as error:
                if not error.is_full or tokens == least:
                    raise
                tokens = max(tokens // 2, least)
            except PeerRefused as error:
                # A hop that refuses a length and names no shorter one would have this ask for ever.
                if not least <= error.fits < tokens:
                    raise
                tokens = error.fits
            else:
                self._reserved = tokens
                return session

    async def _open_for(self, tokens: int) -> Session:
        """A session for so many tokens, behind what hops keep of an earlier one if they do."""
        if self.shared is not None:
            shared, self.shared = self.shared, None
            await shared.once(self._keep_beginning)
        if self._kept_texts is not None:
            ids, past = self._transcript.ids, self._past_inputs
            session = await self._kept_texts.open(ids, tokens, self.excluded, past, self._draw, self._packing)
            if session is not None:
                return session
        return await self._open_plainly(tokens)

    async def _open_plainly(self, tokens: int) -> Session:
        past = self._past_inputs
        return await self._source.open_session(tokens, self.excluded, past, packing=self._packing)

    async def _keep_beginning(self) -> None:
        """Have hops compute all tokens so far but the last one, and keep that; quiet if they do not."""
        texts, ids = self._kept_texts, self._transcript.ids[:-1]
        if texts is not None and len(ids) >= LEAST_TOKENS:
            self._windows.sent = (len(ids), ())
            await keep_beginning(ids, self._ends, partial(self._open_plainly, len(ids)), texts)

    async def abandon(self, error: PeerError) -> None:
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
            self._windows.forget()
            session, self._session = self._session, None
            await session.aclose()
        if error.told_by:
            blamed = self._weigh_complaint(error) | (blamed - {error.peer_id})
        logger.info("%s: %s; trying another route", error.peer_id or "a peer", error)
        # Our reader paused for longer than the hops wait, or a hop has no room, which the client remembers.
        # Who named what would fit is not remembered, since for another text it may do.
        if not overslept and not (isinstance(error, PeerRefused) and error.is_passing and not error.fits):
            self.excluded |= blamed

    def _weigh_complaint(self, error: PeerError) -> set[str]:
        """Peers to leave out after one complained of its neighbour.

        The first complaint is believed. With the second one, of another neighbour, it is who complains that
        the two have in common: it is left out, and those that only it spoke against are not.
        """
        accused = self._accused.setdefault(error.told_by, set())
        accused.add(error.peer_id)
        if len(accused) == 1:
            return {error.peer_id}
        self.excluded -= accused
        return {error.told_by}

    def forgive(self) -> None:
        """Leave out nobody any more."""
        self.excluded = frozenset()
        self._accused.clear()

    @property
    def failovers(self) -> int:
        """Hops and sessions that were replaced."""
        return self._failovers + (self._session.failovers if self._session else 0)

    @property
    def per_hop_ms(self) -> tuple[float, ...]:
        """Each hop's median time per decode step, in the last session that there was."""
        return self._session.per_hop_ms() if self._session else self._per_hop_ms

    @property
    def per_step_ms(self) -> float:
        """The median decode step of that session, as seen from here."""
        return self._session.per_step_ms() if self._session else self._per_step_ms

    @property
    def compute_s(self) -> float | None:
        """Seconds that a token took in the hops' blocks, in the last step; None before the first."""
        if self._session is None or not self._session.timings:
            return None
        step = self._session.timings[-1]
        return sum(bill.compute_us for bill in step.bills) / 1e6 / step.tokens

    async def aclose(self) -> None:
        """Let the hops free what they hold; harmless twice."""
        if self._session is not None:
            session, texts = self._session, self._kept_texts
            error: PeerError | None = None
            keep = False
            try:
                if texts is not None and kept_s(session) > 0:
                    await self._windows.let_come()
                error = await session.settle()
                keep = error is None and texts is not None and kept_s(session) > 0
            finally:  # cancelled: what was not checked is nobody's fault
                self._windows.forget()
                self._settle(error)
                self._session = None
                await session.aclose(keep=keep)
            if keep and texts is not None:
                count, guesses = self._windows.sent
                ids = self._transcript.ids
                texts.note(ids[: common_length([*ids[:count], *guesses], ids)], session)

    def _past_inputs(self, start: int, stop: int) -> Inputs:
        """Inputs that a session was given at past positions."""
        # With the guesses that were wrong: until the next step rolls it back, the session counts them.
        count, guesses = self._windows.sent
        past = self._transcript.ids[start : min(stop, count)]
        return self._ends.embed((*past, *guesses[max(0, start - count) : max(0, stop - count)]))

    def _note_route(self, session: Session) -> None:
        """Keep who takes part, and what these hops take; they may have been replaced."""
        self._noted = route = session.route
        limits = session.chain.flow_limits
        self.at_once = limits.chunk_tokens - 1
        self._windows.most = min(limits.chunks_in_flight, MOST_UNDER_WAY)
        # What a hop said of its line was said of the successor that it had then.
        has_changed = session.repair.done or session.handovers.done
        self.expected_s = self._expect_s(route, () if has_changed else session.chain.round_trips_s)
        self.route = tuple(
            HopUsed(hop.peer_id, hop.span, self._source.connection_kind(hop.peer_id)) for hop in route.hops
        )

    def _note_packed(self, session: Session) -> None:
        """Have later sessions pack what this one packs: the text follows from how its prompt was rounded."""
        packed = session.chain.terms.packed
        if self._transcript.packed not in (None, packed):
            logger.info(
                "no hops take a packed prompt any more: where two tokens are near, the text may differ"
            )
        self._transcript.packed = packed
        self._packing = Packing(packed)

    def _settle(self, error: PeerError | None) -> None:
        """Tell the policy and the ledger how the route fared."""
        assert self._session is not None
        outcome = RouteOutcome(
            ok=error is None,
            error=str(error) if error else None,
            failed_peer=(error.peer_id or None) if error else None,
            told_by=(error.told_by or None) if error else None,
            tokens=len(self._transcript.token_ids) - self._tokens_before,
            seconds=time.perf_counter() - self._began_at,
            per_hop_ms=self._session.per_hop_ms(),
        )
        # Kept beyond the session: the result's timings are asked for when its hops are gone.
        self._per_hop_ms, self._per_step_ms = outcome.per_hop_ms, self._session.per_step_ms()
        self._failovers += self._session.failovers
        self._source.route_ended(self._session.route, outcome)
