"""Order in which peers are tried of whom there is only hearsay.

Whoever invents peers decides what they claim, how many they are, and where they seem to be. It does not
decide who tells us of them, nor how many others do. So those who told us take turns, and within what one of
them told the address ranges do: a thousand inventions of one neighbour, or of one range, come no sooner than
the first of another. Bitcoin divides its table of addresses among sources for the same reason
(src/addrman.h).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, zip_longest

from .announcement import Announcement


@dataclass(frozen=True, slots=True)
class Hearsay:
    """Announcement of a peer, and how we came to know of it.

    Attributes:
        teller: Who told us first; empty if nobody in particular.
        number: Place among all first words, in the order in which they came.
        tellers: How many told us; a few are counted.
        address_range: The peer's, as `crowded_range` has it.
    """

    announcement: Announcement
    teller: str = ""
    number: int = 0
    tellers: int = 1
    address_range: str = ""


def in_turns(heard: Iterable[Hearsay], rng: random.Random | None = None) -> list[Announcement]:
    """Announcements in the order to try them: of every teller in turn, and of every range in turn.

    Within a range those come first that most have told of, and then those that were told of first: a
    neighbour hands on those first whom it has met. With `rng` chance decides instead, where not all newcomers
    should turn to the same few.
    """
    ordered = list(heard)
    if rng is None:
        ordered.sort(key=lambda each: (-each.tellers, each.number))
    else:
        rng.shuffle(ordered)
    tellers = _grouped(ordered, lambda each: each.teller)
    return [
        each.announcement for each in _alternating(_alternating(_grouped(told, _range)) for told in tellers)
    ]


def _range(heard: Hearsay) -> str:
    # A range that is in many networks says nothing: its peers are taken one by one.
    return heard.address_range or heard.announcement.peer_id


def _grouped(heard: Iterable[Hearsay], key: Callable[[Hearsay], str]) -> list[list[Hearsay]]:
    groups: dict[str, list[Hearsay]] = {}
    for each in heard:
        groups.setdefault(key(each), []).append(each)
    return list(groups.values())


def _alternating(groups: Iterable[Iterable[Hearsay]]) -> list[Hearsay]:
    """The first of every group, then the second of every group, and so on."""
    return [each for each in chain.from_iterable(zip_longest(*groups)) if each is not None]
