"""Bootstrap: finds the first peers, and keeps a few neighbours.

Addresses come from `--bootstrap`, or else from the first bootstrap_peers.txt that names any: in the working
directory, in the data directory, in the package. They are dialled until one answers, at once first and then
ever more slowly, as are peers of earlier runs; after that, peers from the table fill the neighbourhood up. A
few of it are of our own model, if there are any: one may be connected to many who all serve others. Who
accepts and then says nothing, or soon hangs up, is dialled ever more slowly too; a neighbour lost after
`STEADY_S` at once. A dial that is silent holds up nobody: after `BESIDE_S` others are dialled beside it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

import trio

from p2pinfer.errors import ConfigError, NotAdmitted, NotDialled, PeerError
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.concurrency.pulse import Pulse
from p2pinfer.node.concurrency.rate_limit import RateLimit
from p2pinfer.node.host.host import Host
from p2pinfer.node.transport.addresses import split_peer, with_plain_ids
from p2pinfer.routing.hearsay import in_turns
from p2pinfer.text_files import read_text

from .live_table import LiveTable
from .peer_book import PeerBook
from .proof_gossip import ProofCarrier
from .retries import Retries
from .snapshot import fetch_snapshot

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

FILE_NAME: Final = "bootstrap_peers.txt"
NEIGHBOURS: Final = 4  # fewer connected peers than this, and others are dialled
CHECK_INTERVAL_S: Final = 5.0
STEADY_S: Final = 10.0  # a connection that lasted this long was a success
MAX_FOUND: Final = 64  # peers of the local network that are remembered
BESIDE_S: Final = 1.0  # a dial that takes longer counts for nothing in how many are still wanted
MAX_UNDER_WAY: Final = 32  # dials, and questions to who was dialled
TRIES_PER_S: Final = 0.25  # of peers that others told of and that are not found, on average
CONFIRMED_BY: Final = 3  # neighbours that are asked for all they know, to see what several say
WARN_AFTER: Final = 7  # failures in a row of every bootstrap peer: 16 s, when who needs one has given up


@dataclass(frozen=True, slots=True)
class BootstrapPeer:
    """Somebody to begin with. `hearsay`: its addresses are nobody's word but a stranger's."""

    peer_id: str
    addrs: tuple[str, ...]
    hearsay: bool = False


def bootstrap_peers(given: Sequence[str], data_dir: Path) -> tuple[BootstrapPeer, ...]:
    """The peers to join by: `given`, or those of the first file that names any.

    Raises:
        ConfigError: An address does not name a peer and a place; the message says where it stands.
    """
    if given:
        return _grouped([(with_plain_ids(address), "--bootstrap") for address in given])
    package = Path(__file__).resolve().parents[2]
    # In a checkout this lies in node/, installed in p2pinfer/node/; the file is in the parent of either.
    for path in (Path(FILE_NAME), data_dir / FILE_NAME, package / FILE_NAME):
        if path.is_file() and (lines := _read(path)):
            return _grouped(lines)
    return ()


def _read(path: Path) -> list[tuple[str, str]]:
    """(address, where it stands) for every line that is more than a comment."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}") from exc
    named = [(line.partition("#")[0].strip(), f"{path}, line {n}") for n, line in enumerate(lines, 1)]
    return [(with_plain_ids(address), where) for address, where in named if address]


def _grouped(addresses: Sequence[tuple[str, str]]) -> tuple[BootstrapPeer, ...]:
    by_peer: dict[str, list[str]] = {}
    for address, where in addresses:
        try:
            _, peer_id = split_peer(address)
        except ValueError as exc:
            example = "/ip4/192.0.2.7/tcp/4001/p2p/12D3KooW..."
            raise ConfigError(f"{where}: {exc}; write for example {example}") from exc
        by_peer.setdefault(peer_id, []).append(address)
    return tuple(BootstrapPeer(peer_id, tuple(addrs)) for peer_id, addrs in by_peer.items())


class ModelPeers(Protocol):
    """Source of peers that gossip about the same model. `Gossip` is one."""

    @property
    def revisions(self) -> frozenset[str]:
        """The models that are of interest here."""
        ...

    def topic_peers(self, revision: str) -> set[str]:
        """The peers that we gossip with about one of them."""
        ...


@dataclass(frozen=True, slots=True)
class BootstrapOutcome:
    """Outcome of contacting a bootstrap peer; `answered` is None while nothing is known."""

    address: str
    answered: bool | None
    why: str = ""  # it did not answer


class Neighbourhood:
    """Keeps this process connected: to bootstrap peers first, then to some of the swarm."""

    def __init__(
        self,
        host: Host,
        view: LiveTable,
        peers: Sequence[BootstrapPeer],
        proofs: ProofCarrier | None = None,
        model_peers: ModelPeers | None = None,
        book: PeerBook | None = None,
    ) -> None:
        """Set up; nobody is dialled before `keep` runs.

        Args:
            model_peers: Says who is of our own model among all those that we are connected to.
            book: Peers that were met in earlier runs; whom we meet is added.
        """
        self.settled = trio.Event()  # set once a neighbour's table was taken in
        self.decided = trio.Event()  # set with `settled`, or once all bootstrap peers have turned us away
        self._turned_away: set[str] = set()
        self._host = host
        self._view = view
        self._proofs = proofs
        self._model_peers = model_peers
        self._book = book or PeerBook()
        self._known = self._book.peers()  # of earlier runs
        self._peers = [peer for peer in peers if peer.peer_id != host.peer_id]
        # Nobody can connect to itself; `DuplicateCheck` sees who it is.
        self.ours = tuple(addr for peer in peers if peer.peer_id == host.peer_id for addr in peer.addrs)
        self._found: dict[str, BootstrapPeer] = {}  # in the local network
        self._retries = Retries()
        self._under_way: dict[str, float] = {}  # peers that are dialled or asked, since when
        self._reached_at: dict[str, float] = {}  # peers that we dialled and have not lost
        self._asked = 0  # neighbours, for their tables
        self._rng = random.Random()
        # Of peers that others told of; in vain, as it ends up.
        self._tries = RateLimit(TRIES_PER_S, NEIGHBOURS)
        self._warned = False
        self._is_closed = False
        self._lost = Pulse()  # a peer was lost, or found in the local network
        host.when_disconnected(self._note_loss)

    def add(self, peer_id: str, addrs: tuple[str, ...]) -> None:
        """Somebody found in the local network: dialled like those we were told of, and before others."""
        if len(self._found) < MAX_FOUND and peer_id not in {self._host.peer_id, *self._found}:
            logger.debug("bootstrap.found peer=%s addrs=%s", peer_id, addrs)
            self._found[peer_id] = BootstrapPeer(peer_id, addrs)
            self._wake()

    def close(self) -> None:
        """Look for nobody any more."""
        self._is_closed = True

    @property
    def has_peers(self) -> bool:
        """True if there is anybody to begin with."""
        return bool(self._peers or self._known)

    @property
    def peer_ids(self) -> tuple[str, ...]:
        """The bootstrap peers."""
        return tuple(peer.peer_id for peer in self._peers)

    def outcomes(self) -> list[BootstrapOutcome]:
        """Outcome of every bootstrap peer."""
        connected = set(self._host.connected_peers())
        found: list[BootstrapOutcome] = []
        for peer in self._peers:
            why = self._retries.why(peer.peer_id)
            answered = True if peer.peer_id in connected else False if why else None
            found.append(BootstrapOutcome(peer.addrs[0], answered, "" if answered else why))
        return found

    def describe_failures(self) -> str:
        """Peers that could not be reached and why, in one line; empty if all that were tried answered."""
        return self._retries.describe()

    async def keep(self) -> None:
        """Dial until cancelled, and ask whoever answers what it knows."""
        async with open_nursery() as nursery:
            nursery.start_soon(self._watch_model_peers)
            await self._keep_dialling(nursery)

    async def _keep_dialling(self, nursery: trio.Nursery) -> None:
        while True:
            lost = self._lost.next
            connected = self._host.connected_peers()
            for peer_id in self._reached_at.keys() - set(connected):  # a notice takes a tenth of a second
                self._note_end(peer_id)
            if self._is_closed:
                await trio.sleep_forever()
            if len(connected) < NEIGHBOURS:
                self._start_dials(nursery, self._due(connected))
            if not self.settled.is_set():
                idle = [peer_id for peer_id in connected if peer_id not in self._under_way]
                for peer_id in self._rng.sample(idle, min(1, len(idle))):
                    self._start(nursery, peer_id, self._ask_quietly, peer_id)
            self._start_dials(nursery, self._due_model_peers(connected))
            self._note_met(connected)
            if self._peers and not connected:
                self._warn_once()
            with trio.move_on_at(self._next_look(connected)):
                await lost.wait()

    def _due(self, connected: Sequence[str]) -> list[BootstrapPeer]:
        """Bootstrap peers that are not connected, and as many others as are missing; none too soon again."""
        wanted = [peer for peer in self._peers if peer.peer_id not in connected]
        known = {peer.peer_id for peer in self._peers} | set(connected) | {self._host.peer_id}
        begun = self._begun()
        met = [BootstrapPeer(peer.peer_id, peer.addrs, hearsay=not peer.reached) for peer in self._known]
        near = [peer for peer in (*self._found.values(), *met) if peer.peer_id not in known]
        wanted = [peer for peer in wanted if self._is_due(peer.peer_id)]
        room = max(0, NEIGHBOURS - len(begun.intersection(peer.peer_id for peer in near)))
        wanted += [peer for peer in near if self._is_due(peer.peer_id)][:room]
        missing = max(0, NEIGHBOURS - len(begun.union(connected)) - len(wanted))
        return wanted + self._strangers(None, known, missing)

    def _begun(self) -> set[str]:
        """Peers of whom an answer may come any moment."""
        return {each for each, at in self._under_way.items() if at > trio.current_time() - BESIDE_S}

    def _due_model_peers(self, connected: Sequence[str]) -> list[BootstrapPeer]:
        """Peers of our own model to be dialled, since one may be connected to many who all serve others."""
        met = {self._host.peer_id, *connected}
        lacking = self._models_that_lack(connected)
        due = (self._strangers(revision, met, missing) for revision, missing, _ in lacking)
        return list({peer.peer_id: peer for peers in due for peer in peers}.values())

    def _models_that_lack(self, connected: Sequence[str]) -> Iterator[tuple[str, int, set[str]]]:
        """(model, neighbours that it lacks, all that are heard of) for each of ours that lacks any."""
        if self._model_peers is None:
            return
        for revision in self._model_peers.revisions:
            heard_of = {peer.peer_id for peer in self._view.live(revision)}
            known = (self._model_peers.topic_peers(revision) | heard_of).intersection(connected)
            missing = NEIGHBOURS - len(known | self._begun().intersection(heard_of))
            if missing > 0:
                yield revision, missing, heard_of

    def _strangers(self, revision: str | None, left_out: Collection[str], most: int) -> list[BootstrapPeer]:
        """Peers of a model, or of any, that others told of, to be dialled now; those met before first."""
        most = min(most, int(self._tries.left("", trio.current_time())))
        if most <= 0:
            return []
        heard_of = in_turns(self._view.hearsay(revision), self._rng)
        wanted = (peer for peer in heard_of if peer.addrs and peer.peer_id not in left_out)
        due = [BootstrapPeer(each.peer_id, each.addrs, True) for each in wanted if self._is_due(each.peer_id)]
        return sorted(due, key=lambda peer: not self._view.has_met(peer.peer_id))[:most]

    async def _watch_model_peers(self) -> None:
        """Have them dialled as soon as they are heard of."""
        while True:
            changed = self._view.changed
            if self._due_model_peers(self._host.connected_peers()):
                self._wake()
            await changed.wait()

    def _is_due(self, peer_id: str) -> bool:
        return peer_id not in self._under_way and self._retries.is_due(peer_id)

    def _next_look(self, connected: Sequence[str]) -> float:
        """Time when a missing bootstrap peer is due, or others may have turned up; may be in the past."""
        now = trio.current_time()
        lacking = {peer.peer_id for peer in self._peers}.difference(connected, self._under_way)
        silent = [at + BESIDE_S for at in self._under_way.values() if at + BESIDE_S > now]
        check_at: float = now + CHECK_INTERVAL_S
        # A node that was heard of before its relay let anybody through is found at the second try.
        for _, _, heard_of in self._models_that_lack(connected):
            dues = self._retries.dues(heard_of.difference(connected, self._under_way))
            check_at = min([check_at, *(at for at in dues if at > now)])
        if len(connected) >= NEIGHBOURS:
            return check_at
        return min([check_at, *self._retries.dues(lacking), *silent])

    def _start_dials(self, nursery: trio.Nursery, peers: Sequence[BootstrapPeer]) -> None:
        for peer in peers:
            if len(self._under_way) >= MAX_UNDER_WAY:
                return
            if peer.hearsay:
                self._tries.take("", trio.current_time())
            self._start(nursery, peer.peer_id, self._dial_one, peer)

    def _start(
        self, nursery: trio.Nursery, peer_id: str, work: Callable[[_T], Awaitable[bool]], of: _T
    ) -> None:
        """Have something done about a peer beside the rest, and look on if it has changed anything."""
        if peer_id in self._under_way:
            return
        self._under_way[peer_id] = trio.current_time()

        async def do() -> None:
            try:
                has_changed = await work(of)
            finally:
                del self._under_way[peer_id]
            if has_changed:
                self._wake()

        nursery.start_soon(do)

    async def _dial_one(self, peer: BootstrapPeer) -> bool:
        """Dial and ask a peer; False if that was not allowed at the moment."""
        dialled_at = trio.current_time()
        try:
            await self._host.connect(peer.peer_id, peer.addrs, hearsay=peer.hearsay)
            self._give_back(peer)
            self._reached_at[peer.peer_id] = trio.current_time()
            await self._ask(peer.peer_id)
            self._book.note(peer.peer_id, peer.addrs, reached=True)
            return True
        except PeerError as exc:
            logger.debug("bootstrap.failed peer=%s why=%s", peer.peer_id, exc)
            if isinstance(exc, NotAdmitted):
                self._note_turned_away(peer.peer_id, exc)
            if isinstance(exc, NotDialled):
                self._give_back(peer)
            self._retries.note(peer.peer_id, str(exc), dialled_at)
            return not isinstance(exc, NotDialled)

    def _give_back(self, peer: BootstrapPeer) -> None:
        """Let another stranger be tried in place of one that was found, or not dialled."""
        if peer.hearsay:
            self._tries.give_back("")

    async def _ask(self, peer_id: str) -> None:
        """Take in what a connected peer knows."""
        news = await fetch_snapshot(
            self._host, self._view, peer_id, proofs=self._proofs, confirm=self._asked < CONFIRMED_BY
        )
        self._asked += 1
        logger.debug("bootstrap.asked peer=%s news=%d", peer_id, news)
        self.settled.set()
        self.decided.set()
        self._retries.note_answer(peer_id)

    async def _ask_quietly(self, peer_id: str) -> bool:
        try:
            await self._ask(peer_id)
        except PeerError as exc:
            logger.debug("bootstrap.no_snapshot peer=%s why=%s", peer_id, exc)
            return False
        return True

    def _note_met(self, connected: Sequence[str]) -> None:
        """Note who came to us and says where to be found: next time we may have to look for it."""
        came = set(connected) - self._reached_at.keys()
        for peer in self._view.everybody() if came else ():
            if peer.peer_id in came:
                self._book.note(peer.peer_id, peer.addrs, reached=False)

    def _note_loss(self, peer_id: str) -> None:
        if peer_id in self._reached_at:
            self._note_end(peer_id)
        self._wake()

    def _wake(self) -> None:
        self._lost.fire()

    def _note_end(self, peer_id: str) -> None:
        """Hold it against a peer that we dialled if its connection was short."""
        reached_at = self._reached_at.pop(peer_id)
        lasted_s = trio.current_time() - reached_at
        if lasted_s < STEADY_S:
            self._retries.note(peer_id, f"peer {peer_id} hung up after {lasted_s:.1f} s", reached_at)
        else:
            self._retries.forget(peer_id)

    def _note_turned_away(self, peer_id: str, error: NotAdmitted) -> None:
        """Say it at once: trying on is of no use before somebody changes a key or a list."""
        if peer_id not in self._turned_away and any(peer.peer_id == peer_id for peer in self._peers):
            logger.warning("%s", error)
            self._turned_away.add(peer_id)
        if self._turned_away.issuperset(peer.peer_id for peer in self._peers):
            self.decided.set()

    def _warn_once(self) -> None:
        if not self._warned and all(self._retries.times(peer.peer_id) >= WARN_AFTER for peer in self._peers):
            self._warned = True
            logger.warning("no bootstrap peer answered; trying again. %s", self.describe_failures())
