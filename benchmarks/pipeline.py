"""Seconds that a pipeline over hops takes, by its lines and its computation.

Tests hold them against simulations of every line and hop (tests/test_pipeline.py).
"""

from __future__ import annotations


def pipeline_s(
    tokens: int, chunk_tokens: int, row_s: float, compute_s: float, hops: int, at_once: int
) -> float:
    """Seconds until the last chunk of a prompt has passed all lines and hops.

    Args:
        row_s: Of a token's row on a line.
        compute_s: Of all hops together, for the whole prompt in such chunks.
        at_once: Hops that can compute at the same time.
    """
    chunks = tokens / chunk_tokens
    line_s, computed_s = chunk_tokens * row_s, compute_s / chunks
    return hops * line_s + computed_s + (chunks - 1) * max(line_s, computed_s / at_once)


def bounds_s(
    alone: tuple[float, float], line_s: float, delay_s: float, hops: int, at_once: int
) -> tuple[float, float, float]:
    """Seconds of a step of training: the bound, that of a star, and those of its computation.

    Microbatches may be as small as one likes, and cost no more for it.

    Args:
        alone: Seconds of a pass forward and of one backward, on one processor.
        line_s: Of all rows over an uplink.
        at_once: Hops that can compute at the same time.
    """
    computes = [seconds / at_once for seconds in alone]
    # Hops with a processor each work one after the other on the first rows and the last. Those that share
    # processors leave none idle but until the first rows come, and while the last ones return.
    waits = (hops + 1, 2 * hops) if at_once >= hops else (2, 2)
    bound = sum(max(line_s + (hops + 1) * delay_s, each + waits[0] * delay_s) for each in computes)
    # While rows are on their way to one hop and back, the client sends others to the next.
    star = sum(
        max(hops * line_s + 2 * delay_s, line_s + 2 * hops * delay_s, each + waits[1] * delay_s)
        for each in computes
    )
    return bound, star, sum(computes)
