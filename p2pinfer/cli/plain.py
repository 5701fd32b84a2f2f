"""Words of strangers made fit for a terminal.

What a peer wrote may hold escape sequences that recolour, move or retitle a terminal, and bidirectional marks
that make a line read as something else. Such characters are shown as what they are, never sent.
"""

from __future__ import annotations

from typing import Final

LINE_CHARS: Final = 500  # of a message; more is cut off


def printable(text: str) -> str:
    r"""`text` with every character that does not print as its escape, such as \x1b; spaces stay."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


def one_line(message: str, limit: int = LINE_CHARS) -> str:
    """A message as one line of at most `limit` printable characters."""
    line = printable(" ".join(message.split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


def short_peer(peer_id: str) -> str:
    """`12D3KooWAbc...xyz` -> `12D3..vwxyz`: every id begins alike, so the end is what tells peers apart."""
    return peer_id if len(peer_id) <= 12 else f"{peer_id[:4]}..{peer_id[-6:]}"
