"""Numbers of what happened."""

from __future__ import annotations

import typing

from p2pinfer.node.transport.counters import MEANINGS, Counts, Name


def test_what_is_counted_adds_up_by_label_and_in_total() -> None:
    counts = Counts()
    counts.add("refusals", "busy")
    counts.add("refusals", "busy")
    counts.add("refusals", "leaving", 3)
    counts.add("batches")
    assert counts.total("refusals") == 5
    assert counts.total("refusals", "busy") == 2
    assert counts.by_label("refusals") == {"busy": 2, "leaving": 3}
    assert counts.total("batches") == 1
    assert counts.total("audits") == 0


def test_every_name_has_a_meaning() -> None:
    assert set(MEANINGS) == set(typing.get_args(Name))
