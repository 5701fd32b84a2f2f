"""Traffic that idle-time audits look like: shapes of sessions, and texts that begin them.

A hop that could tell a check from a client would be honest to the checks alone. So a check asks for as much
as clients ask for, sends as much, and stops where they stop. Shapes are those of sessions that this node has
served, in the share that they deserve; until there are enough, those of a prior.

    asked for     what a client reserves: its prompt, and the new tokens that it may want
    computed      how far the session came

Prompts are taken from texts of the operator's own, or from texts that the model itself has written: any
stretch of them, and no stretch twice. There is no list of openings to recognise.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

SHAPES_KEPT: Final = 256
PRIOR_SHAPES: Final = 16  # sessions that the prior counts as
TEXTS_KEPT: Final = 64
TEXT_WORDS: Final = 400  # of one text
WORDS_PER_TOKEN: Final = 0.75

# What clients ask for where nothing is known: the default of a generation, mostly, and round numbers.
_ASKED: Final = {32: 1, 64: 2, 128: 10, 256: 4, 512: 2, 1024: 1}
_PROMPT_MEDIAN: Final = 24.0  # tokens; spread as a log-normal, so that one in forty is ten times as long
_PROMPT_SIGMA: Final = 1.2
_TEXT_MEDIAN: Final = 80.0  # new tokens until a text ends by itself
_TEXT_SIGMA: Final = 0.9


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of a session, in tokens.

    Attributes:
        prompt: That it begins with.
        asked: New ones that it reserves room for.
        new: New ones after which it ends, at most `asked`.
    """

    prompt: int
    asked: int
    new: int


class SessionShapes:
    """Shapes of the sessions that a node has served, as far as a hop can see them."""

    def __init__(self) -> None:
        self._open: dict[str, deque[int]] = {}  # by client: what was reserved, oldest first
        self._seen: deque[tuple[str, int, int]] = deque(maxlen=SHAPES_KEPT)  # client, reserved, computed

    def note_opened(self, client: str, reserved: int) -> None:
        """Take in that a client has opened a session."""
        self._open.setdefault(client, deque()).append(reserved)

    def note_closed(self, client: str, computed: int) -> None:
        """Take in that the client's oldest session has ended."""
        waiting = self._open.get(client)
        if not waiting:
            return
        reserved = waiting.popleft()
        if not waiting:
            del self._open[client]
        if 0 < computed <= reserved:
            self._seen.append((client, reserved, computed))

    def draw(self, most_new: int, rng: random.Random) -> Shape:
        """A shape like those seen, which ends after `most_new` new tokens at the latest.

        One client counts once, however many sessions it has opened: a flood of sessions of one token would
        otherwise decide what checks look like. For the same reason the prior keeps its part.
        """
        by_client: dict[str, list[tuple[int, int]]] = {}
        for client, reserved, computed in self._seen:
            by_client.setdefault(client, []).append((reserved, computed))
        if rng.random() * (len(by_client) + PRIOR_SHAPES) >= len(by_client):
            return _usual(most_new, rng)
        reserved, computed = rng.choice(by_client[rng.choice([*by_client])])
        prompt = max(1, round(computed * rng.uniform(0.1, 0.8)))
        new = max(1, computed - prompt)
        return Shape(prompt, max(new, reserved - prompt), min(new, most_new))


def _usual(most_new: int, rng: random.Random) -> Shape:
    prompt = min(1500, max(1, round(rng.lognormvariate(0.0, _PROMPT_SIGMA) * _PROMPT_MEDIAN)))
    asked = rng.choices([*_ASKED], [*_ASKED.values()])[0]
    ends = max(1, round(rng.lognormvariate(0.0, _TEXT_SIGMA) * _TEXT_MEDIAN))
    return Shape(prompt, asked, min(asked, ends, most_new))


@dataclass(slots=True)
class _Text:
    words: list[str]
    readers: frozenset[str]  # peers that have computed it


class Texts:
    """Texts from which prompts are taken, and who has seen them.

    Args:
        own: Texts of the operator's.
    """

    def __init__(self, own: Iterable[str] = ()) -> None:
        self._texts: deque[_Text] = deque(maxlen=TEXTS_KEPT)
        for text in own:
            self.add(text, ())

    def add(self, text: str, readers: Sequence[str]) -> None:
        """Keep a text that these peers have computed."""
        words = text.split()[-TEXT_WORDS:]
        if words:
            self._texts.append(_Text(words, frozenset(readers)))

    def draw(self, tokens: int, rng: random.Random) -> tuple[str, frozenset[str]]:
        """A prompt of about so many tokens, and the peers that know where it comes from; empty without texts.

        A stretch that was taken is not left in the text, so no prompt is given twice.
        """
        wanted = max(1, round(tokens * WORDS_PER_TOKEN))
        words: list[str] = []
        readers: frozenset[str] = frozenset()
        while len(words) < wanted and self._texts:
            text = rng.choice(self._texts)
            start = rng.randrange(max(1, len(text.words) - (wanted - len(words)) + 1))
            stop = start + wanted - len(words)
            words += text.words[start:stop]
            readers |= text.readers
            self._texts.remove(text)
            rest = max(text.words[:start], text.words[stop:], key=len)
            if len(rest) > 1:
                self._texts.append(_Text(rest, text.readers))
        return " ".join(words), readers
