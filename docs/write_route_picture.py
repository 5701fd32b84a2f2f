"""Writes docs/route.svg, the picture of a route in the README: `make docs`.

Sizes in it are those of the bundled model. The picture has its own colours for light and dark surroundings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from p2pinfer.models.span import BlockSpan
from p2pinfer.planning.described_model import describe_model

PICTURE = Path(__file__).with_name("route.svg")
WIDTH, HEIGHT = 840, 292
BOX, TALL, TOP = 176, 92, 74  # of a computer: width, height, and its upper edge
STYLE = """\
<style>
  text { font: 14px system-ui, sans-serif; fill: #1b1f27 }
  .name { font-weight: 600 } .soft { fill: #586073; font-size: 13px }
  .box { fill: #fff; stroke: #2f8a57; stroke-width: 2 } .you { stroke: #1f5fcc }
  .spare { stroke: #8d95a5; stroke-dasharray: 5 4 }
  .line { fill: none; stroke: #1f5fcc; stroke-width: 2 } .head { fill: #1f5fcc }
  .block { fill: #2f8a57 } .unheld { fill: #d9dde6 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e7eaf0 } .soft { fill: #a3acbd }
    .box { fill: #1b2029; stroke: #58b983 } .you { stroke: #82adff } .spare { stroke: #8d95a5 }
    .line { stroke: #82adff } .head { fill: #82adff }
    .block { fill: #58b983 } .unheld { fill: #343c4a }
  }
</style>"""


def picture() -> str:
    """The SVG document: a client, three hops, and a peer that stands by."""
    spec = describe_model("tiny-stories", cache_dir=Path())
    spans = [BlockSpan(0, 3), BlockSpan(3, 6), BlockSpan(6, spec.num_blocks)]
    row = spec.numerics.row_bytes(spec.hidden_size)
    title = "A route: the client embeds a token, three nodes compute all blocks, the client draws the next"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        STYLE,
        *_computer(0, "you", "client", ["tokenizer, embedding", "head, sampling"]),
    ]
    for index, span in enumerate(spans, start=1):
        parts += _computer(index, "", f"node {'ABC'[index - 1]}", [f"blocks {span.start} to {span.stop - 1}"])
        parts += _blocks(index, span, spec.num_blocks)
        parts.append(_arrow(_left(index) - _gap() + 3, _left(index) - 3, TOP + TALL / 2))
    parts += _way_back(f"{row:,} bytes of hidden state a token from hop to hop, and the last one's back")
    parts += _spare(spans[1], spec.num_blocks)
    return "\n".join([*parts, "</svg>", ""])


def _gap() -> float:
    return (WIDTH - 4 * BOX - 8) / 3


def _left(index: int) -> float:
    return 4 + index * (BOX + _gap())


def _computer(index: int, kind: str, name: str, lines: Sequence[str], top: float = TOP) -> Iterator[str]:
    x = _left(index)
    yield f'<rect class="box {kind}" x="{x:g}" y="{top:g}" width="{BOX}" height="{TALL}" rx="10"/>'
    yield _text(x + 14, top + 26, name, "name")
    for number, line in enumerate(lines):
        yield _text(x + 14, top + 48 + 20 * number, line)


def _blocks(index: int, span: BlockSpan, count: int, top: float = TOP) -> Iterator[str]:
    """The axis of blocks, those of `span` filled."""
    each = (BOX - 28) / count
    for block in range(count):
        held = "block" if span.start <= block < span.stop else "unheld"
        x = _left(index) + 14 + block * each
        yield f'<rect class="{held}" x="{x:g}" y="{top + 64:g}" width="{each - 2:g}" height="12" rx="2"/>'


def _arrow(start: float, stop: float, y: float) -> str:
    head = f'<path class="head" d="M{stop:g} {y:g}l-9 -5v10z"/>'
    return f'<path class="line" d="M{start:g} {y:g}H{stop - 8:g}"/>{head}'


def _way_back(said: str) -> Iterator[str]:
    start, stop, top = _left(3) + BOX / 2, _left(0) + BOX / 2, 40
    yield f'<path class="line" d="M{start:g} {TOP - 3}V{top}H{stop:g}V{TOP - 11}"/>'
    yield f'<path class="head" d="M{stop:g} {TOP - 3}l-5 -9h10z"/>'
    yield _text(WIDTH / 2, 26, said, "soft", "middle")


def _spare(span: BlockSpan, count: int) -> Iterator[str]:
    top = TOP + TALL + 26
    yield from _computer(2, "spare", "node D", [f"blocks {span.start} to {span.stop - 1} as well"], top)
    yield from _blocks(2, span, count, top)
    yield _text(_left(2) - 14, top + 40, "takes over when node B stops,", "soft", "end")
    yield _text(_left(2) - 14, top + 60, "and the text goes on", "soft", "end")
    yield _text(_left(3) + 2, top + 40, "audits compute parts", "soft")
    yield _text(_left(3) + 2, top + 60, "of the work again", "soft")


def _text(x: float, y: float, said: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(said)}</text>'


def main() -> None:
    PICTURE.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
