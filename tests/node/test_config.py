from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from p2pinfer.node.config import ServeConfig

# Then no session may use an adapter, the node has no ends, and it decides how much is kept.
MAY_BE_ZERO = {"ends", "session_adapter_bytes", "train_bytes"}


NUMBERS = [each.name for each in fields(ServeConfig) if each.default != ""]


@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in MAY_BE_ZERO])
def test_nothing_can_be_served_with_nothing(name: str) -> None:
    nothing: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0; it must be above 0"):
        ServeConfig(**nothing)


@pytest.mark.parametrize("name", sorted(MAY_BE_ZERO))
def test_what_may_be_zero_is_not_below(name: str) -> None:
    options: dict[str, Any] = {name: 0}
    assert getattr(ServeConfig(**options), name) == 0
    with pytest.raises(ValueError, match=f"{name} is -1; it must be above 0"):
        options[name] = -1
        ServeConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"announce_ttl_s": 301.0}, "announce_ttl_s is 301; peers accept 5 to 300"),
        ({"announce_ttl_s": 1.0}, "announce_ttl_s is 1; peers"),
        ({"announce_interval_s": 1.0}, "announce_interval_s is 1, which is less than announce_min_gap_s, 5"),
    ],
)
def test_announcements_keep_to_what_peers_accept(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServeConfig(**options)


@pytest.mark.parametrize("name", ["n" * 33, "two\nlines", "nam\u202ee"])
def test_a_name_that_peers_would_refuse_is_told_before_anything_is_announced(name: str) -> None:
    assert ServeConfig(public_name="Anna's attic").public_name == "Anna's attic"
    with pytest.raises(ValueError, match="at most 32 characters"):
        ServeConfig(public_name=name)
