"""Book of peers that were met, kept over restarts as a last resort for joining again.

What is kept are ids and addresses. Neither is believed: whoever answers has to prove its id, as everybody
has. Peers that we have reached ourselves come first; of those that came to us there is only their own word
where they can be reached, and they take no place of the others'. All of it is bounded and expires.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
import trio

from p2pinfer.folders import write_private
from p2pinfer.node.concurrency.pulse import AutoResetEvent
from p2pinfer.node.transport.addresses import split_peer

logger = logging.getLogger(__name__)

FILE_NAME: Final = "peers.json"
CLIENT_FILE_NAME: Final = "client_peers.json"
MAX_REACHED: Final = 32  # peers that we have reached
MAX_HEARD: Final = 16  # peers that have only come to us
MAX_ADDRS: Final = 8  # of one peer
EXPIRES_S: Final = 30 * 86400.0  # after a peer was met last, by this machine's clock
WRITE_PAUSE_S: Final = 1.0  # between writes, so that what changes together is written together
REFRESH_S: Final = 3600.0  # a peer that is met again is noted anew after this time
_MAX_BYTES: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class KnownPeer:
    """One peer of the book."""

    peer_id: str
    addrs: tuple[str, ...]
    reached: bool
    met_at: float  # Unix time


class _Noted(msgspec.Struct, frozen=True):
    peer_id: Annotated[str, msgspec.Meta(max_length=128)]
    addrs: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=512)], ...], msgspec.Meta(max_length=64)]
    reached: bool
    met_at: float


class PeerBook:
    """The peers that one data directory remembers. Reads its file at once when made."""

    def __init__(
        self,
        data_dir: Path | None = None,
        wall_clock_s: Callable[[], float] = time.time,
        *,
        file_name: str = FILE_NAME,
    ) -> None:
        """Keep nothing without `data_dir`."""
        self._path = None if data_dir is None else data_dir / file_name
        self._clock = wall_clock_s
        self._peers = {peer.peer_id: peer for peer in self._read()}
        self._dirty = AutoResetEvent()
        self._told = False

    def peers(self) -> list[KnownPeer]:
        """Peers to try, the likeliest to answer first."""
        return sorted(self._peers.values(), key=lambda peer: (not peer.reached, -peer.met_at))

    def keep_if_met(self, peer_ids: Sequence[str]) -> None:
        """Forget all peers unless one of these is among them: they were met in another swarm."""
        if self._peers.keys().isdisjoint(peer_ids):
            self._peers.clear()

    def begin_with(self, named: Mapping[str, Sequence[str]]) -> None:
        """Keep those who were met in the swarm of these peers (id -> addresses), and note that it is theirs.

        A text may be there before all of them have answered, and one of the others be named next time.
        """
        self.keep_if_met(list(named))
        for peer_id, addrs in named.items():
            self.note(peer_id, addrs, reached=False)

    def note(self, peer_id: str, addrs: Sequence[str], *, reached: bool) -> None:
        """A peer is there. Whether we reached it, or it came to us and says to be reached at `addrs`."""
        known = self._peers.get(peer_id)
        addrs = _usable(peer_id, addrs)
        if self._path is None or not addrs or (known is not None and known.reached and not reached):
            return
        now = self._clock()
        is_same = known is not None and (known.addrs, known.reached) == (addrs, reached)
        if is_same and known is not None and abs(now - known.met_at) < REFRESH_S:
            return
        self._peers[peer_id] = KnownPeer(peer_id, addrs, reached, now)
        self._make_room()
        self._dirty.set()

    async def keep(self) -> None:
        """Write what changes, until cancelled."""
        while self._path is not None:
            await self._dirty.wait()
            await trio.to_thread.run_sync(self._write, self._path, self._encoded())
            await trio.sleep(WRITE_PAUSE_S)

    def _make_room(self) -> None:
        for reached, most in ((True, MAX_REACHED), (False, MAX_HEARD)):
            of_kind = [peer for peer in self.peers() if peer.reached == reached]
            for peer in of_kind[most:]:
                del self._peers[peer.peer_id]

    def _encoded(self) -> bytes:
        noted = [_Noted(peer.peer_id, peer.addrs, peer.reached, peer.met_at) for peer in self.peers()]
        return msgspec.json.encode(noted)

    def _write(self, path: Path, encoded: bytes) -> None:
        try:
            write_private(path, encoded, durable=True)
        except OSError as exc:
            if not self._told:
                self._told = True
                logger.warning("cannot save known peers in %s: %s", path, exc.strerror or exc)

    def _read(self) -> list[KnownPeer]:
        """Notes that have not expired; none if the file is damaged."""
        if self._path is None:
            return []
        try:
            with self._path.open("rb") as file:
                noted = msgspec.json.decode(file.read(_MAX_BYTES), type=list[_Noted])
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, json.JSONDecodeError):
            return []
        now = self._clock()
        # A time that lies ahead was noted before the clock was set back: as good as this moment.
        return [
            KnownPeer(each.peer_id, addrs, each.reached, min(each.met_at, now))
            for each in noted[: MAX_REACHED + MAX_HEARD]
            if now - each.met_at < EXPIRES_S and (addrs := _usable(each.peer_id, each.addrs))
        ]


def _usable(peer_id: str, addrs: Sequence[str]) -> tuple[str, ...]:
    """Addresses that can be dialled and lead to this peer, with its id at the end."""
    usable: list[str] = []
    for address in addrs:
        for written in (address, f"{address}/p2p/{peer_id}"):
            try:
                if split_peer(written)[1] == peer_id:
                    usable.append(written)
                    break
            except ValueError:
                continue
    return tuple(dict.fromkeys(usable))[:MAX_ADDRS]
