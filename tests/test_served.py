"""What announcements say of the models of a swarm, and what may be made of a peer's words."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from p2pinfer.models.span import BlockSpan
from p2pinfer.routing.announcement import Announcement, OfferedAdapter
from p2pinfer.served import MAX_LISTED, describe_served, offered_adapters, served_models

A, B, C = "a" * 32, "b" * 32, "c" * 32


def said(revision: str, start: int, stop: int, name: str = "org/model", num_blocks: int = 8) -> Announcement:
    span = BlockSpan(start, stop)
    return Announcement(f"p{start}", name, revision, span, "float32", 1.0, 1, 1, num_blocks=num_blocks)


def test_models_come_complete_ones_first_then_the_larger() -> None:
    models = served_models(
        {
            A: [said(A, 0, 4), said(A, 2, 6), said(A, 4, 6)],
            B: [said(B, 0, 8)],
            C: [said(C, 0, 5), said(C, 5, 8)],
            "d" * 32: [],
        }
    )
    assert [each.revision for each in models] == [C, B, A]
    assert models[2].missing == [BlockSpan(6, 8)]
    assert str(models[2]) == "org/model (without blocks 6:8 of 8, revision aaaaaaaa)"


def test_most_peers_decide_on_name_and_size() -> None:
    peers = [said(A, 0, 4, "lie/model", 4096), said(A, 0, 8), said(A, 0, 8), said(A, 0, 2, num_blocks=0)]
    (model,) = served_models({A: peers})
    assert (model.model, model.num_blocks) == ("org/model", 8)
    (earlier,) = served_models({A: [said(A, 0, 4, num_blocks=0), said(A, 4, 6, num_blocks=0)]})
    assert earlier.num_blocks == 6


def test_what_is_served_comes_with_a_command_that_joins_the_same_swarm() -> None:
    models = served_models({A: [said(A, 0, 8)]})
    told = describe_served(models, ["--bootstrap", "/ip4/127.0.0.1/tcp/1", "--swarm-key", "my key"])
    assert told.startswith("this swarm serves org/model (all 8 blocks, revision aaaaaaaa); `")
    assert shlex.split(told.split("`")[1]) == [
        *("p2pinfer", "generate", "--model", "org/model", "--bootstrap", "/ip4/127.0.0.1/tcp/1"),
        *("--swarm-key", "my key", "Once upon a time"),
    ]
    assert describe_served([]) == ""


@pytest.mark.parametrize("name", ["my-folder", "a/b/c", "x; rm -rf ~", "`reboot`/x", "$(reboot)/x", "-rf/x"])
def test_no_command_is_made_of_what_is_no_id(name: str) -> None:
    told = describe_served(served_models({A: [said(A, 0, 8, name)]}))
    assert told.endswith("; who has the files of it asks by --model FOLDER")


def test_of_many_models_a_few_are_named() -> None:
    revisions = [f"{number:032x}" for number in range(9)]
    models = served_models({each: [said(each, 0, 8, "folder")] for each in revisions})
    models += served_models({A: [said(A, 0, 8)]})
    told = describe_served(models)
    assert told.count("revision") == 3
    assert " and 7 more; `p2pinfer generate --model org/model" in told


def test_an_adapter_has_the_name_that_most_peers_give_it() -> None:
    stories, lie = OfferedAdapter(b"s" * 32, "stories", 9), OfferedAdapter(b"s" * 32, "a lie", 9)
    code = OfferedAdapter(b"c" * 32, "code", 9)
    peers = [replace(said(A, 0, 8), adapters=each) for each in ((lie,), (stories, code), (stories,), ())]
    assert offered_adapters(peers) == [code, stories]
    many = [OfferedAdapter(bytes([each]) * 32, "x", 9) for each in range(MAX_LISTED + 9)]
    assert len(offered_adapters([replace(said(A, 0, 8), adapters=tuple(many))])) == MAX_LISTED
