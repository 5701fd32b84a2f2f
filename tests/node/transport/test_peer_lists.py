"""Whom an entry of a list concerns."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pinfer.errors import ConfigError
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.node.transport.peer_lists import SCOPES, PeerList, files_of, read_lists

ANNA, BEN, EVE = (new_identity().peer_id for _ in range(3))


def on(peers: PeerList, peer_id: str) -> set[str]:
    return {scope for scope in SCOPES if peers.has(peer_id, scope)}


def test_an_entry_concerns_everything_or_what_stands_before_it() -> None:
    peers = read_lists([ANNA, f"clients:{BEN}", f"nodes,relaying:{EVE}"])
    assert on(peers, ANNA) == set(SCOPES)
    assert on(peers, BEN) == {"clients"}
    assert on(peers, EVE) == {"nodes", "relaying"}
    assert peers.scopes == set(SCOPES)
    assert read_lists([f"clients:{BEN}"]).scopes == {"clients"}
    assert read_lists([]).scopes == set()


def test_a_line_of_a_file_says_more_exactly_whom_it_concerns(tmp_path: Path) -> None:
    listed = tmp_path / "friends"
    listed.write_text(
        f"\ufeff# friends\n{ANNA} clients # of mine\n\n{BEN} nodes, relaying\n", encoding="utf-8"
    )
    peers = read_lists([str(listed)])
    assert (on(peers, ANNA), on(peers, BEN)) == ({"clients"}, {"nodes", "relaying"})
    assert peers.scopes == set(SCOPES)
    listed.write_text(f"{ANNA}\n{BEN} relaying\n")
    peers = read_lists([f"nodes:{listed}"])
    assert (on(peers, ANNA), on(peers, BEN)) == ({"nodes"}, {"relaying"})


def test_an_empty_file_is_about_what_stands_before_it(tmp_path: Path) -> None:
    (tmp_path / "nobody").write_text("# nobody yet\n")
    assert read_lists([f"clients:{tmp_path / 'nobody'}"]).scopes == {"clients"}
    assert read_lists([str(tmp_path / "nobody")]).scopes == set(SCOPES)


def test_a_file_may_have_a_colon_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "my:friends").write_text(f"{ANNA}\n")
    assert on(read_lists([str(tmp_path / "my:friends")]), ANNA) == set(SCOPES)
    assert files_of([ANNA, f"clients:{tmp_path}/my:friends"]) == [tmp_path / "my:friends"]


@pytest.mark.parametrize(
    ("entry", "line", "complaint"),
    [
        ("clients,guests:{file}", "", "not 'guests'"),
        pytest.param(
            "{file}",
            f"{ANNA} guests",
            "friends, line 1: a list concerns clients, nodes, relaying, not 'guests'",
            id="a line about guests",
        ),
        ("{file}", "anna clients", "friends, line 1: 'anna' is not a peer id"),
        ("clients:{file}.txt", "", "neither a peer id nor a file"),
    ],
)
def test_what_makes_no_sense_is_named(tmp_path: Path, entry: str, line: str, complaint: str) -> None:
    (tmp_path / "friends").write_text(line)
    with pytest.raises(ConfigError, match=complaint):
        read_lists([entry.format(file=tmp_path / "friends")])
