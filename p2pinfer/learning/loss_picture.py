"""Picture of a training's loss: an SVG of two lines, the losses and their running mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape

_WIDTH: Final = 720
_HEIGHT: Final = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 36, 44
_POINTS: Final = 1000  # more than the pixels of a line are averaged
_TICKS: Final = 5


def loss_picture(losses: Sequence[float], title: str) -> str:
    """An SVG document; its x axis counts steps from 1. Losses that are not finite are left out."""
    points = [(step, loss) for step, loss in enumerate(losses, start=1) if math.isfinite(loss)]
    low, high = _range([loss for _, loss in points])
    last = max(len(losses), 2)

    def place(step: float, loss: float) -> tuple[float, float]:
        x = _LEFT + (step - 1) / (last - 1) * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (high - loss) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return x, y

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(title)}</text>',
    ]
    for value in _ticks(low, high):
        _, y = place(1, value)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for step in _steps(last):
        x, _ = place(step, low)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">step</text>')
    for line, colour, width in ((points, "#9bb8d9", 1), (_smoothed(points), "#1f4e8c", 2)):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*each) for each in _thinned(line)))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
    return "\n".join([*parts, "</svg>", ""])


def _range(losses: Sequence[float]) -> tuple[float, float]:
    low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Round values between two."""
    raw = (high - low) / _TICKS
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * each for each in (1, 2, 5, 10) if unit * each >= raw)
    return [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _steps(last: int) -> list[int]:
    return sorted({1, *(round(1 + (last - 1) * part / 4) for part in range(1, 5))})


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean of the last twentieth of all losses, at every step."""
    window = max(1, len(points) // 20)
    made: list[tuple[int, float]] = []
    total = 0.0
    for index, (step, loss) in enumerate(points):
        total += loss - (points[index - window][1] if index >= window else 0.0)
        made.append((step, total / min(index + 1, window)))
    return made


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // _POINTS) or 1
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [
        (sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups
    ]
