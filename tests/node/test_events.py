from __future__ import annotations

import json
from typing import get_args

import msgspec
import pytest

from p2pinfer.node.events import (
    Event,
    Joined,
    Loading,
    NodeLeaving,
    Reached,
    Ready,
    SessionClosed,
    SessionOpened,
    SessionRefused,
    Starting,
    Stopped,
    Verified,
    to_json,
)

EXAMPLES: list[Event] = [
    Starting("12D3", ("/ip4/127.0.0.1/tcp/1/p2p/12D3",), "tiny-stories", "ab"),
    Loading((0, 4), "asked for"),
    Joined(2, ("/ip4/192.0.2.7/tcp/1",), (("/ip4/192.0.2.8/tcp/1", "Connection refused"),)),
    Reached("public", "none", ("/ip4/192.0.2.7/tcp/1/p2p/12D3",), ("12D3",), "reachable from the internet"),
    Ready(
        "12D3", ("/ip4/127.0.0.1/tcp/1/p2p/12D3",), "tiny-stories", "ab", (0, 4), "bfloat16", "cpu", 9.5, 64
    ),
    Ready("12D3", (), "", "", None, "", "", 0.0, 0),
    SessionOpened("12D3", (0, 4), 64, 1),
    SessionClosed("12D3", 9, "done", 0),
    SessionRefused("12D3", "busy", "two lines\nof text"),
    Verified(4, 2, 1, 0),
    NodeLeaving(0),
    Stopped(61.5, 2, 400, 1, 1000, 2000, 0, 1),
]


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: type(event).__name__)
def test_an_event_is_one_object_on_one_line_that_names_itself(event: Event) -> None:
    line = to_json(event)
    assert "\n" not in line
    told = json.loads(line)
    assert list(told) == ["event", *type(event).__struct_fields__]
    assert msgspec.json.decode(line, type=type(event)) == event


def test_a_ready_event_says_what_scripts_wait_for() -> None:
    told = json.loads(to_json(EXAMPLES[4]))
    assert told["event"] == "ready"
    assert {key: told[key] for key in ("peer_id", "addrs", "model", "revision", "blocks")} == {
        "peer_id": "12D3",
        "addrs": ["/ip4/127.0.0.1/tcp/1/p2p/12D3"],
        "model": "tiny-stories",
        "revision": "ab",
        "blocks": [0, 4],
    }


def test_every_event_has_an_example_and_a_name_of_its_own() -> None:
    assert {type(event) for event in EXAMPLES} == set(get_args(Event))
    names = [json.loads(to_json(event))["event"] for event in EXAMPLES]
    assert len(set(names)) == len(get_args(Event))
