"""Quantities as people write them: 20Mbit, 2.5MB/s, 16GiB."""

from __future__ import annotations

import re
from typing import Final

from p2pinfer.errors import ConfigError

_NUMBER: Final = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)(/s)?\s*", re.IGNORECASE)
_FACTORS: Final = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BINARY: Final = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_rate(text: str, flag: str) -> float:
    """Bytes per second: `20Mbit`, `20Mbit/s`, `2.5MB/s`, `1Gbps`; a number alone is bytes.

    Raises:
        ConfigError: It is something else, or not above 0. It names `flag`.
    """
    found = _NUMBER.fullmatch(text)
    if found is not None:
        unit = found[2].lower()
        if unit.endswith(("bit", "bps")) and unit[:-3] in _FACTORS:
            return _positive(float(found[1]) * _FACTORS[unit[:-3]] / 8, text, flag)
        if (factor := _bytes(unit)) is not None:
            return _positive(float(found[1]) * factor, text, flag)
    raise ConfigError(f"{flag} {text}: write a rate such as 20Mbit, 1Gbit or 2.5MB/s")


def parse_size(text: str, flag: str) -> float:
    """Bytes: `16GiB`, `24GB`, `512MiB`; a number alone is bytes.

    Raises:
        ConfigError: It is something else, or not above 0. It names `flag`.
    """
    found = _NUMBER.fullmatch(text)
    if found is not None and not found[3] and (factor := _bytes(found[2].lower())) is not None:
        return _positive(float(found[1]) * factor, text, flag)
    raise ConfigError(f"{flag} {text}: write a size such as 16GiB, 24GB or 512MiB")


def _bytes(unit: str) -> float | None:
    """Bytes of one `unit`, None if there is no such unit."""
    prefix = unit.removesuffix("b")
    return _BINARY.get(prefix) or _FACTORS.get(prefix)


def _positive(amount: float, text: str, flag: str) -> float:
    if not 0 < amount < 1e18:
        raise ConfigError(f"{flag} {text}: it must be above 0, and something that a computer can have")
    return amount
