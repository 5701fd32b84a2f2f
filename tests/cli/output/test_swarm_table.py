"""Who serves what, at a glance."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
from rich.console import Console

from p2pinfer.cli.output.swarm_table import blocks_bar, draw
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.span import BlockSpan
from p2pinfer.routing.announcement import Announcement
from p2pinfer.swarm_view import AllModels, PeerView, State, SwarmView

SPEC = ModelSpec(
    model="tiny",
    revision="ab" * 16,
    family="llama",
    dtype="bfloat16",
    num_blocks=8,
    hidden_size=320,
    vocab_size=4096,
    max_positions=1024,
    kv_heads=4,
    head_dim=40,
    block_parameters=1_000_000,
)


def peer(
    peer_id: str,
    span: BlockSpan,
    connection: Literal["direct", "relayed"] | None,
    rtt_ms: float | None,
    state: State = "answers",
) -> PeerView:
    said = Announcement(peer_id, "tiny", SPEC.revision, span, "bfloat16", 1234.5, 65536, 1)
    return PeerView(said, connection, rtt_ms, state)


def shown(view: SwarmView, width: int = 100) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(draw(view), crop=False)
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.mark.parametrize(
    ("spans", "num_blocks", "bar"),
    [
        ([], 4, "····"),
        ([BlockSpan(0, 2)], 4, "██··"),
        ([BlockSpan(0, 2), BlockSpan(1, 4)], 4, "████"),
        ([BlockSpan(0, 99)], 4, "████"),
        ([BlockSpan(0, 64)], 64, "█" * 32),
        ([BlockSpan(0, 63)], 64, "█" * 31 + "·"),
        ([BlockSpan(0, 33)], 33, "█" * 32),
    ],
)
def test_a_bar_hides_no_gap(spans: list[BlockSpan], num_blocks: int, bar: str) -> None:
    assert blocks_bar(spans, num_blocks) == bar


def test_the_table_goes_along_the_model() -> None:
    view = SwarmView(
        SPEC,
        (
            peer("later", BlockSpan(4, 8), None, None, "refuses"),
            peer("first", BlockSpan(0, 5), "direct", 1.25),
        ),
    )
    assert shown(view) == [
        "tiny  ████████  all 8 blocks are served",
        "",
        "peer   blocks         state       tok/s  free cache  dtype     connection     rtt",
        "first  █████···  0:5  answers     1,234      65,536  bfloat16  direct      1.2 ms",
        "later  ····████  4:8  refuses us  1,234      65,536  bfloat16  -                -",
    ]


@pytest.mark.parametrize(
    ("ghosts", "headline"),
    [
        ([(4, 8)], "tiny  ████░░░░  the peers that announced 4:8 of its 8 blocks do not answer"),
        (
            [(2, 6)],
            "tiny  ████░░··  nobody serves 6:8 of its 8 blocks; the peers that announced 4:6 do not answer",
        ),
        ([(0, 3)], "tiny  ████····  nobody serves 4:8 of its 8 blocks"),
        (
            [(4, 5), (7, 8)],
            "tiny  ████░··░  nobody serves 5:7 of its 8 blocks; the peers that announced 4:5, 7:8 do not",
        ),
    ],
)
def test_blocks_of_who_does_not_answer_are_not_called_served(
    ghosts: list[tuple[int, int]], headline: str
) -> None:
    silent = [peer(f"ghost{start}", BlockSpan(start, stop), None, None, "unknown") for start, stop in ghosts]
    view = SwarmView(SPEC, (peer("first", BlockSpan(0, 4), "direct", 1.0), *silent))
    assert shown(view)[0].startswith(headline)
    assert view.missing == [BlockSpan(4, 8)]
    announced = {block for start, stop in ghosts for block in range(max(start, 4), stop)}
    assert {block for gap in view.unknown for block in range(gap.start, gap.stop)} == announced
    assert sum("no answer" in line for line in shown(view)) == len(ghosts)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
@pytest.mark.parametrize("alike", [0, 6, 8, 11])
def test_names_that_differ_look_different_however_narrow_the_terminal(width: int, alike: int) -> None:
    ids = [f"12D3KooW{index:030d}{'x' * alike}"[-46:].rjust(46, "1") for index in range(12)]
    peers = [peer(peer_id, BlockSpan(0, 8), "direct", 123.4) for peer_id in ids]
    lines = shown(SwarmView(replace(SPEC, num_blocks=64), tuple(peers)), width)
    rows = lines[-12:]
    assert len({row.split()[0] for row in rows}) == len(ids)
    assert all(any(peer_id.endswith(row.split()[0][-6:]) for peer_id in ids) for row in rows)
    assert not any("…" in line for line in lines)
    if width >= 40:
        assert all(len(line) <= width for line in lines)
        assert all("0:8" in row and "answers" in row for row in rows)


def test_missing_blocks_are_named() -> None:
    view = SwarmView(SPEC, (peer("first", BlockSpan(2, 5), "relayed", 80.0),))
    assert shown(view)[0] == "tiny  ··███···  nobody serves 0:2, 5:8 of its 8 blocks"
    assert shown(SwarmView(SPEC, ())) == ["tiny  ········  nobody serves 0:8 of its 8 blocks"]


def test_of_all_models_those_that_are_served_are_shown_and_told_beside_the_usual_one() -> None:
    usual = SwarmView(SPEC, ())
    other = SwarmView(replace(SPEC, model="other"), (peer("p", BlockSpan(0, 8), None, None),))
    lines = [line for line in shown_all(AllModels(usual, (other,))) if "blocks" in line]
    assert lines[0] == "other  ████████  all 8 blocks are served"
    assert not any(line.startswith("tiny") for line in lines)
    assert shown_all(AllModels(usual, ())) == ["tiny  ········  nobody serves 0:8 of its 8 blocks"]
    both = AllModels(other, (other, SwarmView(SPEC, (peer("q", BlockSpan(0, 4), None, None),))))
    assert sum("blocks" in line and "served" in line for line in shown_all(both)) == 1
    assert "" in shown_all(both)


def shown_all(models: AllModels) -> list[str]:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(draw(models), crop=False)
    return [line.rstrip() for line in capture.get().splitlines()]
