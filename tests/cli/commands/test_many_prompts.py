"""A file of prompts: what it may hold, and texts in its order whatever ends first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2pinfer.cli.commands.many_prompts import generate_all, read_prompts
from p2pinfer.cli.output.waiting import WaitingLine
from p2pinfer.errors import ConfigError, LocalError
from p2pinfer.models.checkpoint.checkpoint import Checkpoint

from ...memory_client import open_memory_client


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"Once upon a time\n\n  The fox \r\nNo end", ["Once upon a time", "  The fox ", "No end"]),
        ("a.txt", "élan".encode("utf-16"), ["élan"]),
        ("a.jsonl", b'{"prompt": "a\\nb", "id": 1}\n\n"c"\n', ["a\nb", "c"]),
    ],
)
def test_a_prompt_is_a_line(name: str, content: bytes, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
        ("a.jsonl", b'"a"\n{"prompt": 1}\n', "line 2 has no prompt"),
        ("a.jsonl", b"[]\n", "line 1 has no prompt"),
        ("a.jsonl", b"a\n", "line 1 is no JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is no JSON"),
    ],
)
def test_a_file_that_holds_none_is_refused(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        read_prompts(tmp_path / name)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts cannot be read from .*none\.txt"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize("as_json", [False, True])
async def test_texts_come_in_the_order_of_the_file_and_a_bad_prompt_costs_only_its_own(
    as_json: bool,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lengths = {"Once upon a time": 9, "word " * 2000: 2, "The little fox": 2}
    waiting = WaitingLine(quiet=True)
    async with open_memory_client(checkpoint, monkeypatch, tmp_path) as (client, swarm):
        await swarm.serve("a", 0, 8)
        with pytest.raises(LocalError, match="1 of 3 texts could not be generated; the prompt"):
            await generate_all(
                client,
                list(lengths),
                lambda sent: client.generate(
                    sent, max_new_tokens=lengths[sent] if isinstance(sent, str) else 1, temperature=0
                ),
                3,
                waiting,
                as_json=as_json,
            )
        await swarm.all_closed()
    told, said = capsys.readouterr()
    lines = told.splitlines()
    if as_json:
        first, failed, last = map(json.loads, lines)
        assert failed["kind"] == "PromptTooLong"
        assert (len(first["token_ids"]), len(last["token_ids"])) == (9, 2)
        lines = [first["text"], "", last["text"]]
    else:
        assert "prompt 2: " in said
    assert lines[0].startswith(", there was a little girl")
    assert lines[1] == ""
    assert len(lines) == 3
    assert lines[2]
