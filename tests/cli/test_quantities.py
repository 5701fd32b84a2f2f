"""Rates and sizes as people write them."""

from __future__ import annotations

import pytest

from p2pinfer.cli.quantities import parse_rate, parse_size
from p2pinfer.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("20Mbit", 2.5e6),
        ("20 Mbit/s", 2.5e6),
        ("1gbit", 1.25e8),
        ("8kbps", 1e3),
        ("2.5MB/s", 2.5e6),
        ("50GB", 5e10),
        (".5MiB/s", 2**19),
        ("1000", 1e3),
    ],
)
def test_rates_are_bytes_per_second(text: str, bytes_per_s: float) -> None:
    assert parse_rate(text, "--up") == bytes_per_s


@pytest.mark.parametrize(
    ("text", "size"), [("16GiB", 2**34), ("24GB", 24e9), ("512 MiB", 2**29), ("3g", 3e9), ("7", 7)]
)
def test_sizes_are_bytes(text: str, size: float) -> None:
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "fast", "-1Mbit", "0", "20Mbyte", "1e5", "nan", "5 furlongs", "9" * 40])
def test_anything_else_is_refused_by_the_name_of_its_flag(text: str) -> None:
    with pytest.raises(ConfigError, match="--up"):
        parse_rate(text, "--up")
    with pytest.raises(ConfigError, match="--memory"):
        parse_size(text, "--memory")


def test_a_rate_is_no_size() -> None:
    with pytest.raises(ConfigError, match="--memory"):
        parse_size("16GB/s", "--memory")
