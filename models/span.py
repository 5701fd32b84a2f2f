"""A contiguous run of transformer blocks, half-open: what a node holds and a hop computes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from p2pinfer.errors import ConfigError


@dataclass(frozen=True, slots=True, order=True)
class BlockSpan:
    """Blocks `start`, `start + 1`, ..., `stop - 1` of a model; never empty."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"no such span: {self.start}:{self.stop}")

    @classmethod
    def parse(cls, text: str) -> BlockSpan:
        """The span written as `A:B`, as on the command line.

        Raises:
            ConfigError: `text` is not two whole numbers A < B.
        """
        match = re.fullmatch(r"\s*(\d{1,6}):(\d{1,6})\s*", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise ConfigError(f"{text!r} is not a span of blocks; write A:B with A < B, for example 0:4")
        return cls(int(match[1]), int(match[2]))

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def covers(self, other: BlockSpan) -> bool:
        """True if every block of `other` is one of this span's."""
        return self.start <= other.start and other.stop <= self.stop


def uncovered(spans: list[BlockSpan], num_blocks: int) -> list[BlockSpan]:
    """The gaps that `spans` together leave in `0:num_blocks`, in order."""
    gaps: list[BlockSpan] = []
    reached = 0
    for span in sorted(spans):
        if span.start > reached:
            gaps.append(BlockSpan(reached, min(span.start, num_blocks)))
        reached = max(reached, span.stop)
        if reached >= num_blocks:
            return gaps
    if reached < num_blocks:
        gaps.append(BlockSpan(reached, num_blocks))
    return gaps
