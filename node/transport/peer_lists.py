"""Lists of allowed and denied peers, and the kinds of peer that each entry applies to.

    12D3KooW...                     whatever that peer wants
    clients:12D3KooW...             as a client: the sessions that it opens
    nodes,relaying:friends.txt      the peers of that file, as nodes, and to carry their connections

A file has one peer id a line, and may say behind each whom it concerns: `12D3KooW... clients  # Anna`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias, cast, get_args

from p2pinfer.errors import ConfigError
from p2pinfer.folders import expand
from p2pinfer.text_files import read_text

from .identity import is_peer_id

Scope: TypeAlias = Literal[
    "clients",  # who opens sessions
    "nodes",  # who computes blocks: whose announcements count, who feeds our sessions, whom we feed
    "relaying",  # whose connections we carry
]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
_ALL: Final = frozenset(SCOPES)


@dataclass(frozen=True, slots=True)
class PeerList:
    """Peers by whom an entry concerns.

    Attributes:
        scopes: What the list is about; an empty file is about everything, and holds nobody.
    """

    peers: dict[Scope, frozenset[str]]
    scopes: frozenset[Scope]

    def has(self, peer_id: str, scope: Scope) -> bool:
        """True if the peer is on the list, as far as the scope goes."""
        return peer_id in self.peers[scope]


def read_lists(entries: Sequence[str]) -> PeerList:
    """The list that `entries` and the files among them make.

    Raises:
        ConfigError: An entry is neither a peer id nor a file of them, or names a scope that there is not.
    """
    peers: dict[Scope, set[str]] = {scope: set() for scope in SCOPES}
    about: set[Scope] = set()
    for entry in entries:
        scopes, text = _split(entry)
        found = [(text, scopes)] if is_peer_id(text) else list(_read(text, scopes))
        about |= frozenset[Scope]().union(*(each for _, each in found)) if found else scopes
        for peer_id, concerned in found:
            for scope in concerned:
                peers[scope].add(peer_id)
    return PeerList({scope: frozenset(found) for scope, found in peers.items()}, frozenset(about))


def files_of(entries: Sequence[str]) -> list[Path]:
    """The files among `entries`."""
    texts = (_split(entry)[1] for entry in entries)
    return [expand(text) for text in texts if not is_peer_id(text)]


def _split(entry: str) -> tuple[frozenset[Scope], str]:
    """Scope and rest of an entry. A colon that follows other words is part of a file's name."""
    words, colon, rest = entry.partition(":")
    named = [word.strip() for word in words.split(",")]
    if not colon or not _ALL.intersection(named):
        return _ALL, entry
    return _scopes(named, entry), rest.strip()


def _scopes(words: Sequence[str], where: str) -> frozenset[Scope]:
    for word in words:
        if word not in _ALL:
            raise ConfigError(f"{where}: a list concerns {', '.join(SCOPES)}, not {word[:60]!r}")
    return frozenset(cast("Sequence[Scope]", words))


def _read(file: str, scopes: frozenset[Scope]) -> Iterator[tuple[str, frozenset[Scope]]]:
    try:
        lines = read_text(expand(file)).splitlines()
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{file} is neither a peer id nor a file of them that can be read") from exc
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        if not is_peer_id(words[0]):
            raise ConfigError(f"{file}, line {number}: {words[0][:60]!r} is not a peer id")
        yield words[0], _scopes(words[1:], f"{file}, line {number}") if words[1:] else scopes
