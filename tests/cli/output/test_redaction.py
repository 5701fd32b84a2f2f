"""What a public report tells of a person, a computer and a network: nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.cli.output.redaction import Redactor, own_names
from p2pinfer.node.transport.identity import new_identity

ONE, OTHER = new_identity().peer_id, new_identity().peer_id
NAMES = [("/home/anna", "~"), ("anna", "<user>"), ("annas-laptop", "<computer>")]


def redacted(text: str) -> str:
    return Redactor(NAMES).text(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/ip4/203.0.113.7/tcp/4001", "/ip4/<private address 1>/tcp/4001"),  # of documentation, so not global
        ("/ip4/8.8.8.8/tcp/4001", "/ip4/<address 1>/tcp/4001"),
        ("seen at 8.8.4.4, 8.8.8.8 and 8.8.4.4.", "seen at <address 1>, <address 2> and <address 1>."),
        ("/ip6/2a00:1450:4001::200e/tcp/1", "/ip6/<address 1>/tcp/1"),
        ("fe80::1%eth0 is ours", "<private address 1> is ours"),
        ("::ffff:8.8.8.8", "<address 1>"),
        (
            "2a00:1450:4001::1: it hung up; so did 2a00:1450:4001::2.",
            "<address 1>: it hung up; so did <address 2>.",
        ),
        ("1:2:3:4:5:6:7:8 and 2a00:1450::", "<address 1> and <address 2>"),
        ("/dns4/node.example.org/tcp/4001", "/dns4/<name 1>/tcp/4001"),
        ("https://anna:word@mirror.example.org/simple", "https://<name 1>/simple"),
        ("http://8.8.8.8:8000/v1", "http://<address 1>:8000/v1"),
        (f"/p2p/{ONE} and {OTHER} and {ONE}", "/p2p/<peer 1> and <peer 2> and <peer 1>"),
        ("3.1 GiB free in /home/anna/.cache/p2pinfer", "3.1 GiB free in ~/.cache/p2pinfer"),
        ("anna on annas-laptop, not hanna", "<user> on <computer>, not hanna"),
        ("127.0.0.1, ::1, 0.0.0.0 and localhost say nothing", None),
        ("torch 2.11.0+cpu, 12:30:45, blocks 0:4, 99.5 %", None),
        ("http://localhost:8000/v1 and http://127.0.0.1:8000", None),
    ],
)
def test_what_tells_where_somebody_is_becomes_a_number(text: str, expected: str | None) -> None:
    assert redacted(text) == (text if expected is None else expected)


@given(st.ip_addresses(), st.text("abc ,;/()", max_size=5), st.text("abc ,;/()", max_size=5))
def test_no_address_is_left(address: object, before: str, after: str) -> None:
    text = redacted(f"{before} {address} {after}")
    assert str(address) not in re.sub(r"(127\.\d+\.\d+\.\d+|::1|::|0\.0\.0\.0)(?![\w:])", "", text)


def test_a_document_is_redacted_in_keys_and_values() -> None:
    told = Redactor(NAMES).document({ONE: ["8.8.8.8", 3, None], "addrs": [f"/ip4/8.8.8.8/p2p/{ONE}"]})
    assert told == {"<peer 1>": ["<address 1>", 3, None], "addrs": ["/ip4/<address 1>/p2p/<peer 1>"]}


def test_this_user_and_this_computer_have_names() -> None:
    assert (str(Path.home()), "~") in own_names()
    assert json.dumps(own_names())
