"""View of a swarm: who serves which blocks of a model, and which of those peers answer."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import trio

from p2pinfer.models.span import BlockSpan, uncovered
from p2pinfer.node.swarm.membership import SwarmMember
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.hearsay import in_turns

from .errors import PeerError
from .served import served_models

State: TypeAlias = Literal["answers", "refuses", "unknown"]

CALL_S = 3.0  # how long those announced have to let themselves be reached, routers in between included
PING_S = 2.0  # how long connected peers have to answer a ping
MAX_MODELS = 32  # that are looked at where none was asked about


@dataclass(frozen=True, slots=True)
class PeerView:
    """A peer's announcement, and what is known of the connection to it.

    Attributes:
        state: Whether the peer answered when it was last asked. An announcement outlives its peer by up to
            two minutes, so of one that did not answer nobody knows whether it serves anything.
    """

    announcement: Announcement
    connection: Literal["direct", "relayed"] | None  # None: not connected at the moment
    rtt_ms: float | None
    state: State = "unknown"


def peers_serving(member: SwarmMember, revision: str) -> list[PeerView]:
    """Peers known to serve a model, without asking any of them."""
    return [
        PeerView(said, member.host.connection_kind(said.peer_id), member.rtt_ms(said.peer_id))
        for said in member.announcements(revision)
    ]


class Model(Protocol):
    """Size and revision of a model that is looked at; its files need not be here."""

    @property
    def model(self) -> str: ...

    @property
    def revision(self) -> str: ...

    @property
    def num_blocks(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SwarmView:
    """Peers that serve a model."""

    spec: Model
    peers: tuple[PeerView, ...]

    @property
    def missing(self) -> list[BlockSpan]:
        """The blocks that nobody serves, as far as anybody confirmed it."""
        return uncovered(self.confirmed, self.spec.num_blocks)

    @property
    def unknown(self) -> list[BlockSpan]:
        """The missing blocks that are announced, by peers that do not answer."""
        return uncovered([*self.confirmed, *self.unannounced], self.spec.num_blocks)

    @property
    def announced(self) -> list[BlockSpan]:
        """The span of every peer."""
        return [peer.announcement.span for peer in self.peers]

    @property
    def unannounced(self) -> list[BlockSpan]:
        """The blocks that no peer announces."""
        return uncovered(self.announced, self.spec.num_blocks)

    @property
    def confirmed(self) -> list[BlockSpan]:
        """The span of every peer that answers, if only to refuse."""
        return [peer.announcement.span for peer in self.peers if peer.state != "unknown"]


@dataclass(frozen=True, slots=True)
class AllModels:
    """Views of all models of a swarm.

    Attributes:
        usual: The model that commands take without being told, served or not.
        served: Those that somebody announces.
    """

    usual: SwarmView
    served: tuple[SwarmView, ...]


async def look_at_all(member: SwarmMember, usual: Model) -> AllModels:
    """Views of all models: one peer of each is asked for the others of it."""
    revisions = list(member.models())[:MAX_MODELS]
    async with trio.open_nursery() as nursery:
        for revision in revisions:
            nursery.start_soon(member.look_into, revision)
    announced = {revision: peers for revision, peers in member.models().items() if revision in revisions}
    views = {each.revision: await look_at(member, each) for each in served_models(announced)}
    shown = views.get(usual.revision) or SwarmView(usual, ())
    return AllModels(shown, tuple(views.values()))


async def look_at(member: SwarmMember, spec: Model) -> SwarmView:
    """List the announcements of a model, which of their peers answer, and how far they are."""
    await member.presence.call(in_turns(member.hearsay(spec.revision)), CALL_S)
    rtts_ms: dict[str, float] = {}

    async def ping(peer_id: str) -> None:
        with suppress(PeerError):  # then there is no number for it
            rtts_ms[peer_id] = await member.host.ping(peer_id) * 1e3

    with trio.move_on_after(PING_S):
        async with trio.open_nursery() as nursery:
            for peer_id in member.host.connected_peers():
                nursery.start_soon(ping, peer_id)

    def state(peer_id: str) -> State:
        if peer_id in rtts_ms:
            return "answers"
        return "refuses" if member.presence.refuses_us(peer_id) else "unknown"

    return SwarmView(
        spec,
        tuple(
            PeerView(
                said,
                member.host.connection_kind(said.peer_id),
                rtts_ms.get(said.peer_id),
                state(said.peer_id),
            )
            for said in member.announcements(spec.revision)
        ),
    )
