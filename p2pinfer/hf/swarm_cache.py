"""Cache of a generation whose keys and values are with hops: sessions, one for each row of the batch.

What transformers sees is one of its own caches. In place of a layer's keys it holds what went into block 0,
which is reordered, repeated and cut as keys are. So the sessions need not hear of any of that: they are told
what a row's inputs are, and send what they have not sent.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor
from transformers import DynamicCache

from p2pinfer.errors import NoRoute, PeerError
from p2pinfer.learning.trained_adapter import ModelAdapter

logger = logging.getLogger(__name__)


class Rows(Protocol):
    """Sessions of a batch: `p2pinfer.loops.blocking.BlockingRows`."""

    def run(self, inputs: Sequence[Tensor], new: Sequence[int]) -> list[Tensor]:
        """See `RowSessions.run`."""
        ...

    def close(self) -> None:
        """End them all."""
        ...


class SwarmCache(DynamicCache):
    """Cache for one batch of one model. `generate` makes one.

    Args:
        open_rows: Makes sessions whose rows have an adapter.
    """

    def __init__(self, open_rows: Callable[[ModelAdapter | None], Rows]) -> None:
        super().__init__()
        self._open_rows = open_rows
        self._rows: Rows | None = None
        self._adapter: ModelAdapter | None = None
        self._is_usable = True
        self._close: Callable[[], object] = _nothing

    def extend(self, hidden: Tensor) -> Tensor:
        """(batch, new, hidden_size) -> (batch, all so far, hidden_size)."""
        batch, new, _ = hidden.shape
        whole, _ = self.update(hidden[:, None], hidden.new_empty(batch, 1, new, 0), 0)
        return whole[:, 0]

    def run(
        self, whole: Tensor, mask: Tensor | None, new: int, adapter: ModelAdapter | None
    ) -> Tensor | None:
        """Hidden states after all blocks, of the last `new` columns: (batch, new, hidden_size).

        Args:
            whole: (batch, all so far, hidden_size).
            mask: (batch, all so far), 0 for padding, whose outputs are zeros; None: there is none.

        Returns:
            None where nobody takes such sessions; the log says why.
        """
        if not self._is_usable:
            return None
        if self._rows is None or self._adapter is not adapter:
            self._close()
            self._rows, self._adapter = self._open_rows(adapter), adapter
            self._close = weakref.finalize(self, self._rows.close)
        kept = [
            None if mask is None else row.bool().to(whole.device)
            for row in (mask if mask is not None else whole)
        ]
        inputs = [row if where is None else row[where] for row, where in zip(whole, kept, strict=True)]
        counts = [new if where is None else int(where[-new:].sum()) for where in kept]
        try:
            found = self._rows.run(
                [each.detach().cpu() for each in inputs], [max(1, count) for count in counts]
            )
        except (PeerError, NoRoute) as exc:
            logger.warning(
                "no sessions for this generation, whose texts are computed anew each time: %s", exc
            )
            self._is_usable = False
            return None
        output = whole.new_zeros(len(whole), new, whole.shape[-1])
        for row, where, count, rows in zip(output, kept, counts, found, strict=True):
            values = rows.to(row.device, row.dtype)
            if where is None:
                row.copy_(values)
            elif count:
                row[where[-new:]] = values
        return output


def _nothing() -> None:
    return
