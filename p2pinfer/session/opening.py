"""Opening of a session on all hops of a route at once, and its end on all of them.

What a hop refuses is an error that names whom to leave out of the next route.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

import trio

from p2pinfer.errors import (
    PeerError,
    PeerRefused,
    PeerUnreachable,
    PeerVanished,
    ProtocolViolation,
    WrongOutput,
)
from p2pinfer.models.numerics import parse_numerics, reference_for
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import SESSION_PROTOCOL, Leaving, Open, Opened, Refused
from p2pinfer.routing.route import Hop, Route

from .hop_stream import AsSent, HopStream

# To the farthest hop, for all of an opening. Two hops may be twice as far from each other as each is from us,
# and the first dials the second: eight round trips of theirs at most, and three of ours.
OPENING_ROUND_TRIPS: Final = 20


_NO_ENDS: Final = (
    "it holds no embedding and head for clients without weights; leave out --thin, or have it updated"
)


async def open_hops(
    host: Network,
    openings: Sequence[tuple[Hop, Open]],
    route: Route,
    *,
    max_payload_bytes: int,
    within_s: float,
    as_sent: AsSent,
) -> list[HopStream]:
    """Open a session on every hop at once. `route` is what they are to be part of.

    Steps are sent to them as `as_sent` has it. `within_s` is the limit where round trips take no time; it
    grows by `OPENING_ROUND_TRIPS` of them.

    Raises:
        PeerError: A hop could not be reached or refused; nothing stays open.
    """
    streams: dict[int, FrameStream] = {}
    relayed: set[int] = set()
    ready: dict[int, Opened] = {}
    failures: list[PeerError] = []

    async def open_hop(index: int, hop: Hop, opening: Open, scope: trio.CancelScope) -> None:
        try:
            stream = await host.open_stream(
                hop.peer_id, SESSION_PROTOCOL, hop.addrs, hearsay=True, optimistic=True
            )
            frames = FrameStream(stream, max_payload_bytes=max_payload_bytes, peer_id=hop.peer_id)
            streams[index] = frames
            if stream.is_relayed:
                relayed.add(index)
            await frames.send(opening)
            match (await frames.receive())[0]:
                case Opened() as opened:
                    if reference_for(parse_numerics(opened.dtype)) is None:
                        raise ProtocolViolation(
                            "computes in a format that cannot be audited here", hop.peer_id
                        )
                    # Audits hold a hop to what it names, and routes are chosen by what it has announced.
                    if hop.dtype and opened.dtype != hop.dtype:
                        raise ProtocolViolation(
                            f"computes in {opened.dtype}, and has announced {hop.dtype}", hop.peer_id
                        )
                    if (opening.tokens or opening.draw) and not opened.ends:
                        raise PeerRefused(_NO_ENDS, hop.peer_id, "wrong_model")
                    ready[index] = opened
                case Refused(code="no_session") as refused:
                    # No session was asked for by name: it is this client that is not let in.
                    raise PeerRefused(refused.message, hop.peer_id, "not_admitted")
                case Refused() as refused:
                    raise refusal_error(refused, hop.peer_id, route)
                case Leaving():
                    raise PeerRefused("this node is shutting down", hop.peer_id, "leaving")
                case other:
                    raise ProtocolViolation(f"answered {type(other).__name__} to an opening", hop.peer_id)
        except PeerError as exc:
            failures.append(_explained(exc))
            scope.cancel()

    try:
        with host.within(within_s, route.peer_ids, OPENING_ROUND_TRIPS):
            async with trio.open_nursery() as nursery:
                for index, (hop, opening) in enumerate(openings):
                    nursery.start_soon(open_hop, index, hop, opening, nursery.cancel_scope)
        if not failures and len(ready) < len(openings):
            silent = next(hop for index, (hop, _) in enumerate(openings) if index not in ready)
            failures.append(PeerUnreachable(f"did not open a session within {within_s:g} s", silent.peer_id))
        if failures:
            raise failures[0]
    except BaseException:
        await end_all(list(streams.values()))
        raise
    return [
        HopStream(hop, ready[index], streams[index], is_relayed=index in relayed, as_sent=as_sent)
        for index, (hop, _) in enumerate(openings)
    ]


def refusal_error(refused: Refused, sender: str, route: Route) -> PeerError:
    """The error that a refusal amounts to, and whose it is.

    A hop's word about its neighbour is hearsay: the error says who told. The two share an edge that does not
    work, so leaving the neighbour out of the next route is right whoever is at fault. Its word about anybody
    else is not taken: then it is the sender that is left out.
    """
    peers = route.peer_ids
    at = peers.index(sender)
    neighbours = {*peers[max(at - 1, 0) : at], *peers[at + 1 : at + 2]}
    blamed = refused.peer_id if refused.peer_id in neighbours else sender
    told_by = "" if blamed == sender else sender
    match refused.code:
        case "successor_unreachable":
            return PeerUnreachable(refused.message, blamed, told_by=told_by)
        case "successor_vanished":
            return PeerVanished(refused.message, blamed, told_by=told_by)
        case "wrong_input":
            return WrongOutput(refused.message, blamed, told_by=told_by)
        case "protocol":
            return PeerRefused(refused.message, blamed, refused.code, told_by=told_by)
        case _:
            return PeerRefused(refused.message, sender, refused.code, fits=refused.fits)


def _explained(error: PeerError) -> PeerError:
    """The error, and where the hop does not know our protocol, what can be done."""
    if not (isinstance(error, PeerRefused) and error.code == "not_spoken"):
        return error
    why = "it serves no sessions of this version of p2pinfer; one of the two sides has to be updated"
    return PeerRefused(why, error.peer_id, error.code)


async def end_all(streams: Sequence[FrameStream | HopStream], *, keep: bool = False) -> None:
    """End every stream, shielded and within a second: a hop frees its cache when it hears of it.

    Args:
        keep: Ask the hops to keep the session's cache while they have room.
    """
    with trio.CancelScope(shield=True), trio.move_on_after(1):
        async with trio.open_nursery() as closing:
            for stream in streams:
                closing.start_soon(partial(stream.end, keep=keep))
