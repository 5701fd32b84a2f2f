"""Models that a swarm serves, by its announcements alone, without their files or any trust.

Names, counts and revisions are what peers say of themselves. Where they differ, most of them count.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.span import BlockSpan, uncovered
from p2pinfer.routing.announcement import Announcement, OfferedAdapter

PROMPT: Final = "Once upon a time"  # of the commands that are suggested
MAX_NAMED: Final = 3  # models in one message
MAX_LISTED: Final = 64  # adapters, of which strangers may announce as many as they like
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model that somebody announces.

    Attributes:
        model: What most of its peers call it.
        num_blocks: How many blocks most of them say it has.
    """

    model: str
    revision: str
    num_blocks: int
    peers: tuple[Announcement, ...]

    @property
    def missing(self) -> list[BlockSpan]:
        """The blocks that nobody announces."""
        return uncovered([peer.span for peer in self.peers], self.num_blocks)

    def __str__(self) -> str:
        said = ", ".join(map(str, self.missing))
        part = f"without blocks {said} of {self.num_blocks}" if said else f"all {self.num_blocks} blocks"
        return f"{self.model} ({part}, revision {self.revision[:8]})"


def served_models(announced: Mapping[str, Sequence[Announcement]]) -> list[ServedModel]:
    """The models of these announcements by revision, complete ones first, then those with the most peers."""
    models = [_model_of(revision, peers) for revision, peers in announced.items() if peers]
    return sorted(models, key=lambda each: (bool(each.missing), -len(each.peers), each.model, each.revision))


def _model_of(revision: str, peers: Sequence[Announcement]) -> ServedModel:
    names = Counter(peer.model for peer in peers)
    counts = Counter(peer.num_blocks for peer in peers if peer.num_blocks)
    reach = max(peer.span.stop for peer in peers)
    num_blocks = counts.most_common(1)[0][0] if counts else reach  # peers of before do not say it
    return ServedModel(names.most_common(1)[0][0], revision, num_blocks, tuple(peers))


def offered_adapters(peers: Sequence[Announcement]) -> list[OfferedAdapter]:
    """The adapters that most of these peers of one model offer, each once, under its most frequent name."""
    names = Counter(each for peer in peers for each in peer.adapters)
    found: dict[bytes, OfferedAdapter] = {}
    for each, _ in names.most_common():
        found.setdefault(each.digest, each)
    return sorted([*found.values()][:MAX_LISTED], key=lambda each: (each.name, each.digest))


def describe_served(models: Sequence[ServedModel], joining: Sequence[str] = ()) -> str:
    """Served models and how to ask for the first, in one line; empty if there are none.

    Args:
        joining: The options by which the swarm is joined, as words of a command line.
    """
    if not models:
        return ""
    named = ", ".join(map(str, models[:MAX_NAMED]))
    more = f" and {len(models) - MAX_NAMED} more" if len(models) > MAX_NAMED else ""
    return f"this swarm serves {named}{more}; {_how_to_ask(models, joining)}"


def joining_options(bootstrap: Sequence[str], swarm_key: str | Path | None) -> list[str]:
    """Options by which a command joins the same swarm, as words of a command line."""
    words = [word for address in bootstrap for word in ("--bootstrap", address)]
    return [*words, *(("--swarm-key", str(swarm_key)) if swarm_key is not None else ())]


def _how_to_ask(models: Sequence[ServedModel], joining: Sequence[str]) -> str:
    for each in models:
        # Only what is an id for certain becomes a command: a name is anything that a peer may write.
        if _HUB_ID.fullmatch(each.model) or each.model == BUNDLED_MODEL:
            words = ["p2pinfer", "generate", "--model", each.model, *joining, PROMPT]
            return f"`{shlex.join(words)}` asks for it"
    return "who has the files of it asks by --model FOLDER"
