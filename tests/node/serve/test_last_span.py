"""The note of what was served last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2pinfer.models.span import BlockSpan
from p2pinfer.node.serve.last_span import FILE_NAME, last_span, remember_span

REVISION = "ab" * 16


def test_a_span_is_remembered_for_its_model_alone(tmp_path: Path) -> None:
    home = tmp_path / "new"
    assert last_span(home, REVISION, 8) is None
    remember_span(home, REVISION, BlockSpan(1, 3))
    remember_span(home, REVISION, BlockSpan(2, 5))
    assert [path.name for path in home.iterdir()] == [FILE_NAME]
    assert last_span(home, REVISION, 8) == BlockSpan(2, 5)
    assert last_span(home, "cd" * 16, 8) is None
    assert last_span(home, REVISION, 4) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "\xff",
        json.dumps({"revision": REVISION}),
        json.dumps({"revision": REVISION, "start": 3, "stop": 3}),
        json.dumps({"revision": REVISION, "start": -1, "stop": 3}),
        json.dumps({"revision": REVISION, "start": "0", "stop": 3}),
    ],
)
def test_a_damaged_note_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(content, encoding="latin-1")
    assert last_span(tmp_path, REVISION, 8) is None


def test_a_note_that_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE_NAME).mkdir()
    remember_span(tmp_path, REVISION, BlockSpan(0, 3))
    (message,) = caplog.messages
    assert message.startswith("cannot save the served blocks in")
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
