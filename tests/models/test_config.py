from __future__ import annotations

from typing import Any

import pytest

from p2pinfer.models.config import ComputeConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": -1}, "threads is -1; it must be 0 or more"),
        ({"cache_bytes": -1}, "cache_bytes is -1; it must be 0 or more"),
        ({"page_tokens": 0}, "page_tokens is 0; it must be 1 or more"),
    ],
)
def test_what_cannot_be_computed_with_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ComputeConfig(**options)
