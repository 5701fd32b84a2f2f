"""Liveness probes of a session's hops while a step takes long.

A hop that is busy is not a hop that is dead: its event loop answers whatever its device computes, and says
whether its successor answers. A result that comes meanwhile is as good as an answer.

Nor is a hop dead that is being sent a long prompt over a thin line. It is asked on its connection, ahead of
the prompt, and has as long as its line takes (`Line.patience_s`). Only the question for its successor goes
behind the prompt, since the hop has to answer that one itself; so it is asked when what is under way has had
its time.

A hop may answer and still not do what it was asked for. Work that it takes part in has its time, too
(`attended`): a replay that does not come to its end would hold up the session, whose steps wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import PeerError, PeerVanished

from .chain import Chain
from .hop_stream import HopStream
from .in_flight import InFlight

_USUAL_BYTES_PER_S: Final = 1 << 20  # what a link carries at least, if nothing was measured


async def keep_watch(
    chain: Chain,
    steps: InFlight,
    *,
    after_s: float,
    within_s: float,
    on_silent: Callable[[HopStream, PeerError], None],
    on_cut: Callable[[HopStream, PeerError], None],
) -> None:
    """Look around whenever steps wait, for as long as it runs.

    Args:
        after_s: How long nothing comes or goes before hops are asked.
        within_s: How long they have for an answer.
        on_silent: Hears of a hop that gave none.
        on_cut: Hears of a hop that answers, but not the one before it.
    """
    looked_at = -math.inf
    while True:
        await steps.any_awaited()
        due_at = max(steps.progress_at, looked_at) + after_s
        if trio.current_time() < due_at:
            await trio.sleep_until(due_at)
            continue
        asked_at, epoch = trio.current_time(), chain.epoch
        rate = chain.hops[0].line.bytes_per_s or _USUAL_BYTES_PER_S
        under_way_s = steps.bytes_under_way / rate
        is_overdue = steps.progress_at + after_s + under_way_s <= asked_at
        silent, cut = await chain.probe(within_s, ask_successors=is_overdue)
        if steps.progress_at < asked_at and chain.epoch == epoch:
            for hop in silent:
                on_silent(hop, PeerVanished("it does not answer pings", hop.peer_id))
                await hop.hang_up()  # or whoever looks for it again would do so on this connection
            for hop in cut:
                # The chain may have changed while others were hung up on.
                before = chain.neighbours([hop])[0] if hop in chain.hops else None
                told_by = before.peer_id if before is not None else ""
                on_cut(hop, PeerVanished("its predecessor cannot reach it", hop.peer_id, told_by=told_by))
        looked_at = trio.current_time()


async def attended(
    hops: Sequence[HopStream], work: Callable[[], Awaitable[None]], config: SessionConfig, limit_s: float
) -> None:
    """Await `work()` for as long as all `hops` show signs of life.

    Args:
        hops: Who takes part. The first counts as at fault if `work` does not end.

    Raises:
        PeerError: One of them stopped to, its stream ended, or the time is over; or what `work` raises.
    """

    # Collected, not raised where they occur: what leaves a nursery is an exception group, and callers go
    # by the first `PeerError` and by the peer that it names.
    errors: list[PeerError] = []

    async def attend(hop: HopStream, scope: trio.CancelScope) -> None:
        while not hop.lost.is_set():
            with trio.move_on_after(config.probe_after_s):
                await hop.lost.wait()
            # Its own sign of life alone: the hop behind may be the very one that is being replaced, and
            # waiting for that would make a living hop look dead.
            if await hop.probe(config.probe_timeout_s, ask_successor=False) is None:
                break
        errors.append(PeerVanished("it does not answer pings", hop.peer_id))
        scope.cancel()

    with trio.move_on_after(limit_s) as patience:
        async with trio.open_nursery() as nursery:
            for hop in hops:
                nursery.start_soon(attend, hop, nursery.cancel_scope)
            try:
                await work()
            except PeerError as exc:
                errors.append(exc)
            nursery.cancel_scope.cancel()
    if patience.cancelled_caught:
        errors.append(PeerVanished(f"it was not fed within {limit_s:.0f} s", hops[0].peer_id))
    if errors:
        raise errors[0]
