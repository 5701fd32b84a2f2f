"""Escaping of text from peers before it reaches a terminal.

What a peer wrote may hold escape sequences that recolour, move or retitle a terminal, and bidirectional marks
that make a line read as something else. Such characters are shown as what they are, never sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

LINE_CHARS: Final = 500  # of a message; more is cut off
_ENDING: Final = 6  # characters of a peer id that are shown where none of those shown ends alike


def printable(text: str) -> str:
    r"""`text` with every character that does not print as its escape, such as \x1b; spaces stay."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


def one_line(message: str, limit: int = LINE_CHARS) -> str:
    """A message as one line of at most `limit` printable characters."""
    line = printable(" ".join(message.split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


def ascii_json(text: str) -> str:
    r"""JSON in ASCII: every other character as \uXXXX, so that it is the same in every encoding."""
    return "".join(char if char.isascii() else json.dumps(char)[1:-1] for char in text)


def short_peer(peer_id: str, ending: int = _ENDING) -> str:
    """`12D3KooWAbc...xyz` -> `12D3..vwxyz`: every id begins alike, so the end is what tells peers apart."""
    return peer_id if len(peer_id) <= ending + 6 else f"{peer_id[:4]}..{peer_id[-ending:]}"


def short_peers(peer_ids: Iterable[str]) -> dict[str, str]:
    """Each peer's short name among these: no two are alike. Anybody can make an id that ends like another."""
    ids, ending = set(peer_ids), _ENDING
    while True:
        names = {peer_id: short_peer(peer_id, ending) for peer_id in ids}
        if len(set(names.values())) == len(ids):
            return names
        ending += 2
