"""Who serves what, at a glance."""

from __future__ import annotations

import pytest
from rich.console import Console

from p2pinfer.cli.view import PeerSeen, SwarmView, blocks_bar
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.spec import ModelSpec
from p2pinfer.routing.announcement import Announcement

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


def peer(peer_id: str, span: BlockSpan, connection: str | None, rtt_ms: float | None) -> PeerSeen:
    said = Announcement(peer_id, "tiny", SPEC.revision, span, "bfloat16", 1234.5, 65536, 1)
    return PeerSeen(said, connection, rtt_ms)


def shown(view: SwarmView) -> list[str]:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(view)
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
        SPEC, (peer("later", BlockSpan(4, 8), None, None), peer("first", BlockSpan(0, 5), "direct", 1.25))
    )
    assert shown(view) == [
        "tiny  ████████  all 8 blocks are served",
        "",
        "peer   blocks         tok/s  free cache  dtype     connection     rtt",
        "first  █████···  0:5  1,234      65,536  bfloat16  direct      1.2 ms",
        "later  ····████  4:8  1,234      65,536  bfloat16  -                -",
    ]


def test_missing_blocks_are_named() -> None:
    view = SwarmView(SPEC, (peer("first", BlockSpan(2, 5), "relayed", 80.0),))
    assert shown(view)[0] == "tiny  ··███···  nobody serves 0:2, 5:8 of its 8 blocks"
    assert shown(SwarmView(SPEC, ())) == ["tiny  ········  nobody serves 0:8 of its 8 blocks"]


def test_json_has_everything() -> None:
    view = SwarmView(SPEC, (peer("first", BlockSpan(0, 5), "direct", 1.25),))
    assert view.to_dict() == {
        "model": "tiny",
        "revision": "ab" * 16,
        "num_blocks": 8,
        "missing": [[5, 8]],
        "peers": [
            {
                "peer_id": "first",
                "blocks": [0, 5],
                "dtype": "bfloat16",
                "tokens_per_s": 1234.5,
                "free_cache_tokens": 65536,
                "reachability": "unknown",
                "addrs": [],
                "connection": "direct",
                "rtt_ms": 1.25,
            }
        ],
    }
