"""Inputs of forward passes, kept for the backward passes to come, in so many bytes.

They save a client half of what a backward pass sends, and the hop a pass. Nothing depends on them: a client
whose inputs are gone sends them again. So they make room whenever there is none: those of the client that has
most, its oldest first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from p2pinfer.models.learning.rows import Rows
from p2pinfer.models.learning.span_passes import BlockGraph, Graphs


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs of one forward pass.

    Attributes:
        rows: The sequences.
        blocks: What went into each block, (tokens, hidden_size).
        digest: Of the inputs as they came.
        adapter: Digest of the adapter that the pass was by, or None.
        seed: Of its dropout.
        graphs: Of some blocks, for one backward pass by the same adapter and seed.
    """

    rows: Rows
    blocks: tuple[Tensor, ...]
    digest: bytes
    adapter: bytes | None = None
    seed: int = 0
    graphs: Graphs = field(default_factory=dict[int, BlockGraph])

    @property
    def size(self) -> int:
        """Bytes of all that is kept, while no graph is used up."""
        return sum(each.nbytes for each in self.blocks) + sum(each.size for each in self.graphs.values())


class KeptInputs:
    """Inputs of all sessions, for the event loop.

    Attributes:
        held_bytes: Bytes that are kept.
        bytes_in_flight: Bytes of requests without an answer, for whoever lets them in.
        max_bytes: Limit of what is kept from now on.
    """

    def __init__(self, max_bytes: int) -> None:
        self.held_bytes = 0
        self.bytes_in_flight = 0
        self.max_bytes = max_bytes
        self._kept: dict[tuple[Hashable, int], tuple[str, Inputs, int]] = {}  # with its size, oldest first
        self._held_by: Counter[str] = Counter()

    def add(self, session: Hashable, number: int, client: str, inputs: Inputs) -> None:
        """Keep the inputs of a session's pass, unless they alone are more than all that is kept."""
        self.drop(session, number)
        if inputs.size > self.max_bytes:
            inputs.graphs.clear()
        size = inputs.size
        if size > self.max_bytes:
            return
        while self.held_bytes + size > self.max_bytes:
            greediest = max(self._held_by, key=lambda each: self._held_by[each])
            self.drop(*next(key for key, (owner, *_) in self._kept.items() if owner == greediest))
        self._kept[session, number] = (client, inputs, size)
        self.held_bytes += size
        self._held_by[client] += size

    @property
    def graph_bytes(self) -> int:
        """Bytes that the graphs of one more pass may take: half of what is left."""
        return max(0, self.max_bytes - self.held_bytes) // 2

    def get(self, session: Hashable, number: int) -> Inputs | None:
        """Inputs of a pass, if they are still here."""
        kept = self._kept.get((session, number))
        return None if kept is None else kept[1]

    def drop(self, session: Hashable, number: int) -> None:
        """Keep the inputs of a pass no longer."""
        kept = self._kept.pop((session, number), None)
        if kept is not None:
            client, _, size = kept
            self.held_bytes -= size
            self._held_by[client] -= size
            if not self._held_by[client]:
                del self._held_by[client]

    def drop_all(self, session: Hashable) -> None:
        """Keep nothing of a session."""
        for key in [key for key in self._kept if key[0] == session]:
            self.drop(*key)
