"""Chain of hops in a running session, some of which can be replaced while the others keep their caches.

Theory of operation. Everything that the blocks behind a hop know of a session was computed from what that hop
received; so a replacement that is given the same input again has the same cache. That input is in the replay
log of the hop before, or, for the first hop, follows from the token ids.

    open       the replacements open the session, with the neighbours that they will have; the hop after is
               told to expect the last of them, the hop before links to the first of them
    replay     the hop before sends its log, or the client what it embeds, marked as replay: it runs through
               all replacements and no further
    take over  the link to them takes the place of the former one, under a new epoch: whatever is still on its
               way under the old one is superseded, and results of it are not taken any more

Where nothing has failed, the session goes on until the last of these; after a failure it waits. A log that
does not reach back to the beginning is no obstacle: the replay then starts further up, and runs through hops
that live as well.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import msgspec
import trio

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import PeerError, PeerRefused, PeerUnreachable
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.messages import Open, Prefix, Step, Successor
from p2pinfer.node.transport.line_rate import MAX_RTT_S
from p2pinfer.routing.route import Hop, Route

from .flow_limits import FlowLimits, agree, common_prefix, replay_limit_s
from .hop_stream import HopStream, Listener
from .opening import OPENING_ROUND_TRIPS, end_all, open_hops
from .terms import Inputs, SessionTerms

logger = logging.getLogger(__name__)

# What went in at positions start to stop - 1.
ReplaySource = Callable[[int, int], Inputs]


class NoReplay(PeerError):
    """Past of the session that nobody can tell any more."""


@dataclass(slots=True)
class Replacement:
    """Hops that have opened the session and stand by to take the place of `replaced`."""

    hops: list[HopStream]
    replaced: tuple[HopStream, ...]
    filled: int = 0  # positions in their caches


class Chain:
    """The hops in order, the client's streams to them, and the epoch of what is under way.

    Attributes:
        route: The hops as a route; another one, and not an equal one, after every change.
        prefix: Positions that were in every hop's cache when the session opened.
    """

    def __init__(
        self,
        host: Network,
        nursery: trio.Nursery,
        terms: SessionTerms,
        config: SessionConfig,
        listener: Listener,
        replay_source: ReplaySource | None = None,
    ) -> None:
        """`replay_source` is called in a thread; without it the first hop is not replaced."""
        self.hops: list[HopStream] = []
        self.route = Route(())
        self.epoch = 0
        self.prefix = 0
        self.host = host
        self.terms = terms
        self._replay_source = replay_source
        self._nursery = nursery
        self._config = config
        self._listener = listener

    @property
    def flow_limits(self) -> FlowLimits:
        """Negotiated flow limits of the chain."""
        return self._limits_of(self.hops)

    def _limits_of(self, hops: Sequence[HopStream]) -> FlowLimits:
        """Half of what the hops take: steps that are sent again meet the first ones in the queue."""
        config = self._config
        limits = [
            msgspec.structs.replace(
                hop.opened,
                max_steps_in_flight=max(1, hop.opened.max_steps_in_flight // 2),
                max_bytes_in_flight=max(1, hop.opened.max_bytes_in_flight // 2),
            )
            for hop in hops
        ]
        return agree(config.chunk_tokens, config.chunks_in_flight, self.terms.row_bytes, limits)

    @property
    def way_s(self) -> float:
        """About the seconds from here through all hops and back, by the distance alone."""
        # For want of better, two hops count as far from each other as the farther one of them is from us.
        rtts_s = [min(hop.line.rtt_s, MAX_RTT_S) for hop in self.hops]
        return (rtts_s[0] + rtts_s[-1] + sum(max(pair) for pair in pairwise(rtts_s))) / 2

    @property
    def round_trips_s(self) -> tuple[float, ...]:
        """Round trips to the first hop, from hop to hop as those said, and to the last; 0: not known."""
        own = [hop.line.rtt_s or hop.line.least_rtt_s for hop in (self.hops[0], self.hops[-1])]
        return (own[0], *(hop.opened.successor_us / 1e6 for hop in self.hops[:-1]), own[1])

    def replay_limit_s(self, replacement: Replacement, stop: int) -> float:
        """Seconds that a replay of positions `0..stop` may take, wherever it begins."""
        hops = len(self.hops) + len(replacement.hops)
        return replay_limit_s(stop, self.terms.row_bytes, hops, self._config.step_timeout_s)

    def begin_epoch(self) -> None:
        """Supersede what is under way: steps sent from now on are told from it by a higher epoch."""
        self.epoch += 1

    async def open(self, route: Route, prefix: Prefix | None = None) -> None:
        """Open the session on every hop of `route`, behind a `prefix` as far as all of them have it.

        Raises:
            PeerError: A hop could not be reached or refused; nothing stays open.
        """
        openings = self._openings(route.hops, None, None)
        if prefix is not None:
            openings = [msgspec.structs.replace(each, prefix=prefix) for each in openings]
        self.hops = await self._open_hops(openings, route, self._config.open_timeout_s)
        self.route = route
        if prefix is not None:
            self.prefix = common_prefix([hop.opened for hop in self.hops], prefix.tokens)

    async def close(self) -> None:
        """End the session on every hop."""
        await end_all(self.hops)

    def neighbours(self, hops: Sequence[HopStream]) -> tuple[HopStream | None, HopStream | None]:
        """Hops before and after adjacent hops; None is the client."""
        first, last = self.hops.index(hops[0]), self.hops.index(hops[-1])
        after = self.hops[last + 1] if last + 1 < len(self.hops) else None
        return (self.hops[first - 1] if first else None), after

    # ------------------------------------------------------------------ who is there

    async def probe(
        self, within_s: float, *, ask_successors: bool = True
    ) -> tuple[list[HopStream], list[HopStream]]:
        """The hops that do not answer, and those that answer us but not the hop before them."""
        hops = list(self.hops)
        silent: list[HopStream] = []
        cut: list[HopStream] = []

        async def probe(index: int, hop: HopStream) -> None:
            alive = await hop.probe(within_s, ask_successor=ask_successors)
            if alive is None:
                silent.append(hop)
            elif alive.successor is False and index + 1 < len(hops):
                cut.append(hops[index + 1])

        async with trio.open_nursery() as nursery:
            for index, hop in enumerate(hops):
                nursery.start_soon(probe, index, hop)
        return silent, [hop for hop in cut if hop not in silent]

    # ------------------------------------------------------------------ replacing

    async def open_replacement(
        self, replaced: Sequence[HopStream], route: Route, within_s: float
    ) -> Replacement:
        """Open the session on the hops of `route`, which covers the span of `replaced`.

        Raises:
            PeerError: One of them, or a neighbour, could not; nothing stays open.
        """
        before, after = self.neighbours(replaced)
        openings = self._openings(route.hops, before, after)
        whole = Route((*([before.hop] if before else []), *route.hops, *([after.hop] if after else [])))
        hops: list[HopStream] = []

        async def open_them() -> None:
            if after is not None:
                await after.expect(route.hops[-1].peer_id)
            hops.extend(await self._open_hops(openings, whole, within_s))

        async def link_up() -> None:
            if before is not None:
                await before.relink(route.hops[0], 0, 0, replay=1, epoch=self.epoch, switch=False)

        # At once, since each waits for the other end: the hop before attaches to a session that is being
        # opened, and `Opened` comes only when the replacement has attached to the hop after. No `switch` yet:
        # the link stands by for the replay, and steps go on over the former one.
        try:
            with self._patience(whole, within_s) as patience:
                await _together(open_them, link_up)
            if patience.cancelled_caught:
                raise PeerUnreachable(f"was not linked to within {within_s:g} s", route.hops[0].peer_id)
        except BaseException:
            await end_all(hops)
            raise
        return Replacement(hops, tuple(replaced))

    async def fill(self, replacement: Replacement, stop: int) -> None:
        """Bring the caches of `replacement` up to position `stop` while the session goes on.

        Raises:
            PeerError: As `take_over` does.
        """
        before, _ = self.neighbours(replacement.replaced)
        first, count = replacement.hops[0], len(replacement.hops)
        start, replacement.filled = replacement.filled, stop
        if before is not None:
            await before.relink(
                first.hop,
                start,
                stop,
                replay=count,
                epoch=self.epoch,
                switch=False,
                limits=self._limits_of(replacement.hops),
            )
        else:
            await self._feed(replacement.hops, start, stop, self.epoch)
            await first.all_filled()

    async def take_over(self, replacement: Replacement, stop: int) -> None:
        """Give `replacement` what it lacks of positions `0..stop`, then put it in its place.

        Raises:
            PeerError: One of them or the hop before is gone; `NoReplay` if nobody can tell the positions.
        """
        before, _ = self.neighbours(replacement.replaced)
        epoch = self.epoch + 1
        # Everything that can fail comes before `hops` and `epoch` change, so after an error the chain is what
        # it was, and the next attempt may use the same number again: an epoch must not fall along a link, but
        # may repeat. Changing them first would drop results of steps that the former hops still answer.
        if before is None:
            await self._feed(replacement.hops, replacement.filled, stop, epoch)
        else:
            await self._relink_over(before, replacement, stop, epoch)
        at = self.hops.index(replacement.replaced[0])
        self.hops[at : at + len(replacement.replaced)] = replacement.hops
        self.route = Route(tuple(each.hop for each in self.hops))
        self.epoch = epoch
        # In the background: a dead hop would hold up the steps that wait, for the whole time limit.
        self._nursery.start_soon(end_all, replacement.replaced)

    async def reattach(self, hop: HopStream) -> None:
        """Make the edge into `hop` anew; both of its ends have kept what they have.

        Raises:
            PeerError: It cannot be made.
        """
        before, _ = self.neighbours([hop])
        assert before is not None
        await hop.expect(before.peer_id)
        # Nothing is replayed: both ends have kept cache and log, and steps without a result are sent again.
        # The epoch tells those from copies that the broken edge may still deliver, and rises only if the edge
        # holds.
        await before.relink(hop.hop, 0, 0, replay=1, epoch=self.epoch + 1, switch=True)
        self.epoch += 1

    async def _relink_over(self, before: HopStream, replacement: Replacement, stop: int, epoch: int) -> None:
        """Replay and switch; from further up if the hop before has not kept it all."""
        fed = list(replacement.hops)
        relink = partial(before.relink, fed[0].hop, replay=len(fed), epoch=epoch, switch=True)
        try:
            await relink(replacement.filled, stop, limits=self._limits_of(fed))
            return
        except PeerRefused as exc:
            logger.debug("chain.no_replay peer=%s why=%s", before.peer_id, exc)
        # The hop before switches first, with nothing to replay: a replay from further up runs through it and
        # goes on over its link. The other order would feed the hop that is being replaced. It is safe because
        # the caller holds the lock, so that no step goes out until the caches behind the new link are whole.
        await relink(0, 0)
        for target, source in pairwise(self.hops[self.hops.index(before) :: -1]):
            fed.insert(0, target)
            limits = self._limits_of(fed)
            try:
                await source.relink(
                    target.hop, 0, stop, replay=len(fed), epoch=epoch, switch=False, limits=limits
                )
                return
            except PeerRefused as exc:
                logger.debug("chain.no_replay peer=%s why=%s", source.peer_id, exc)
        # Nobody has kept it all, but the token ids give it anew; every hop then computes its part again.
        await self._feed([self.hops[0], *fed], 0, stop, epoch)

    async def _feed(self, hops: Sequence[HopStream], start: int, stop: int, epoch: int) -> None:
        """Replay from here through `hops`, as if this were the hop before them."""
        if start >= stop:
            return
        if self._replay_source is None:
            raise NoReplay("nobody knows any more what went into the first hop", hops[0].peer_id)
        limits = self._limits_of(hops)
        # In a thread: embedding a long past would block the event loop for too long.
        inputs = await trio.to_thread.run_sync(self._replay_source, start, stop)
        encode = self.terms.format().encode_at
        for number, (position, end) in enumerate(self.terms.pieces(start, stop, limits.chunk_tokens)):
            step = Step(number, epoch, position, end - position, 0, replay=len(hops))
            payload = encode(inputs[position - start : end - start], is_packed=position < self.terms.packed)
            await hops[0].fill(step, payload, limits.chunks_in_flight)

    # ------------------------------------------------------------------ opening

    def _patience(self, route: Route, within_s: float) -> AbstractContextManager[trio.CancelScope]:
        """A limit for opening a session on the hops of a route, wherever they turn out to be."""
        return self.host.within(within_s, route.peer_ids, OPENING_ROUND_TRIPS)

    async def _open_hops(self, openings: Sequence[Open], route: Route, within_s: float) -> list[HopStream]:
        hops = {hop.span.start: hop for hop in route.hops}
        asking = [hops[opening.start] for opening in openings]
        async with self.terms.adapter_at(asking):
            named = [
                (hop, msgspec.structs.replace(opening, revision=self.terms.revision(hop.span)))
                for hop, opening in zip(asking, openings, strict=True)
            ]
            opened = await open_hops(
                self.host,
                named,
                route,
                max_payload_bytes=self._config.chunk_tokens * self.terms.row_bytes,
                within_s=within_s,
                as_sent=self.terms.as_sent,
            )
        for each in opened:
            self._nursery.start_soon(each.watch, self._listener)
        return opened

    def _openings(self, hops: Sequence[Hop], before: HopStream | None, after: HopStream | None) -> list[Open]:
        """Requests to open the same session on each hop, with its neighbours."""
        chain = [before.hop if before else None, *hops, after.hop if after else None]
        return [
            Open(
                self.terms.session,
                self.terms.spec.revision,
                hop.span.start,
                hop.span.stop,
                self.terms.max_tokens,
                self.terms.codec,
                predecessor=previous.peer_id if previous else None,
                successor=Successor(following.peer_id, tuple(following.addrs)) if following else None,
                tokens=previous is None and self.terms.draw is not None,
                draw=None if following else self.terms.draw,
                packed=self.terms.packed,
            )
            for previous, hop, following in zip(chain, hops, chain[2:], strict=False)
        ]


async def _together(*works: Callable[[], Awaitable[None]]) -> None:
    """Run all of them at once; the first PeerError ends the others and is raised."""
    errors: list[PeerError] = []

    async def run(work: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        try:
            await work()
        except PeerError as exc:
            errors.append(exc)
            scope.cancel()

    async with trio.open_nursery() as nursery:
        for work in works:
            nursery.start_soon(run, work, nursery.cancel_scope)
    if errors:
        raise errors[0]
