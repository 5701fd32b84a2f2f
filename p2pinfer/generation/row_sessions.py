"""Sessions of the rows of a batch, which grow token by token and may change places.

A row says each time what all of its inputs are. What its session has of them already is not sent again: only
what follows the longest common beginning. So beams that go on from another row's text send what differs, and
a session that broke is replaced by one that is sent all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
import trio
from torch import Tensor

from p2pinfer.errors import PeerError
from p2pinfer.node.concurrency.nurseries import bare_errors
from p2pinfer.session.terms import SessionAdapter

if TYPE_CHECKING:
    from p2pinfer.session.pending import Pending
    from p2pinfer.session.session import Session

    from .adapted_sessions import AdaptingSource

ATTEMPTS: Final = 4  # sessions that may fail while one step is waited for
_MARGIN: Final = 128  # positions that are reserved beyond what is asked for, and as many as there are already


class RowSessions:
    """Sessions of one batch. For one task at a time.

    Args:
        max_positions: Length of the model's context.
        adapter: Of all rows.
    """

    def __init__(
        self, source: AdaptingSource, max_positions: int, adapter: SessionAdapter | None = None
    ) -> None:
        self._source = source
        self._max_positions = max_positions
        self._adapter = adapter
        self._rows: list[_Row] = []

    async def run(self, inputs: Sequence[Tensor], new: Sequence[int]) -> list[Tensor]:
        """Hidden states after all blocks, of the last so many tokens of each row.

        Args:
            inputs: By row: (tokens, hidden_size), all that went in from position 0 on.
            new: By row: how many outputs are wanted, from 1 to all.

        Raises:
            PeerError: Hops failed again and again.
            NoRoute: Nobody serves some of the blocks.
        """
        while len(self._rows) < len(inputs):
            self._rows.append(_Row())
        for row in self._rows[len(inputs) :]:
            await row.close()
        del self._rows[len(inputs) :]
        outputs = [torch.empty(0)] * len(inputs)

        async def run(index: int) -> None:
            outputs[index] = await self._run_row(self._rows[index], inputs[index], new[index])

        with bare_errors():
            async with trio.open_nursery() as nursery:
                for index in range(len(inputs)):
                    nursery.start_soon(run, index)
        return outputs

    async def _run_row(self, row: _Row, inputs: Tensor, new: int) -> Tensor:
        failures = 0
        while True:
            try:
                if row.session is None or len(inputs) > row.room:
                    await row.close()
                    room = min(self._max_positions, 2 * len(inputs) + _MARGIN)
                    row.session = await self._source.open_session(room, row.failed, row.past, self._adapter)
                    row.room = room
                return await row.send(row.session, inputs, new)
            except PeerError:
                failures += 1
                await row.fail()
                if failures == ATTEMPTS:
                    raise

    async def aclose(self) -> None:
        """End all sessions."""
        for row in self._rows:
            await row.close()


class _Row:
    """One row's session, and what it has been sent."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.room = 0
        self.failed: frozenset[str] = frozenset()
        self._sent = torch.empty(0, 0)

    def past(self, start: int, stop: int) -> Tensor:
        """Inputs at these positions, for a hop that replaces another one."""
        return self._sent[start:stop]

    async def send(self, session: Session, inputs: Tensor, new: int) -> Tensor:
        """Outputs of the last `new` inputs."""
        common = min(_common(self._sent, inputs), len(inputs) - new)
        if common < len(self._sent):
            await session.roll_back(common)
        self._sent = inputs
        if len(inputs) - common == 1:
            last: Tensor = await session.decode(inputs[common:], common)
            return last
        limits = session.chain.flow_limits
        wanted, outputs = len(inputs) - new, list[Tensor]()
        in_flight: deque[tuple[Pending, bool]] = deque()

        async def take() -> None:
            pending, returns = in_flight.popleft()
            output = await pending
            if returns:
                outputs.append(output)

        for start in range(common, len(inputs), limits.chunk_tokens):
            stop = min(start + limits.chunk_tokens, len(inputs))
            if len(in_flight) == limits.chunks_in_flight:
                await take()
            returns = max(0, stop - max(start, wanted))
            pending = await session.submit(inputs[start:stop], start, returns=returns)
            in_flight.append((pending, returns > 0))
        while in_flight:
            await take()
        return torch.cat(outputs)

    async def fail(self) -> None:
        """End a session whose hops failed, and ask others next time."""
        if self.session is not None:
            self.failed |= self.session.failed_peers
        await self.close()

    async def close(self) -> None:
        """End the session, if there is one."""
        session, self.session = self.session, None
        self._sent = torch.empty(0, 0)
        if session is not None:
            await session.aclose()


def _common(one: Tensor, other: Tensor) -> int:
    """Number of positions at the beginning that both have alike."""
    count = min(len(one), len(other))
    if not count:
        return 0
    differs = (one[:count] != other[:count]).any(-1)
    return int(differs.to(torch.uint8).argmax()) if bool(differs.any()) else count
