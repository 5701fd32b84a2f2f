"""Removal of what tells who and where somebody is, from a report that is to be shown in public.

Each address, name and peer gets a number, so that a reader still sees which of them are the same. Loopback
addresses stay. What is removed is decided by form, so a name that stands in free text stays; the user, the
computer and the home folder are removed wherever they stand.
"""

from __future__ import annotations

import getpass
import ipaddress
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, cast

_LEAST_NAME: Final = 3  # letters; shorter names of users and computers are parts of other words
_PEER: Final = re.compile(
    r"\b(?:12D3KooW[1-9A-HJ-NP-Za-km-z]{44}|16Uiu2HA[1-9A-HJ-NP-Za-km-z]{45}|Qm[1-9A-HJ-NP-Za-km-z]{44})\b"
)
_SHORT_PEER: Final = re.compile(r"\b12D3(?:KooW)?\.\.+\w+")
_IPV4: Final = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\d)")
_IPV6: Final = re.compile(
    r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,8}(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{1,4})?(?:%\w+)?(?!\w)"
)
_DNS: Final = re.compile(r"(?<=/)(dns[46]?|dnsaddr)/([^/\s,;]+)")
_URL: Final = re.compile(r"(https?://)(?:[^/\s@]*@)?([^/\s:,;]+)")


class Redactor:
    """Replaces what it finds, in all texts of one report alike."""

    def __init__(self, names: Sequence[tuple[str, str]] | None = None) -> None:
        """A redactor; `names` are what is removed wherever it stands, and what stands there instead."""
        self._names = own_names() if names is None else names
        self._numbers: dict[str, dict[str, int]] = {}

    def text(self, text: str) -> str:
        """`text` without them."""
        text = _PEER.sub(lambda found: self._numbered("peer", found[0]), text)
        text = _SHORT_PEER.sub(lambda found: self._numbered("peer", found[0]), text)
        text = _DNS.sub(lambda found: f"{found[1]}/{self._numbered('name', found[2])}", text)
        text = _URL.sub(lambda found: found[1] + self._host(found[2]), text)
        text = _IPV6.sub(lambda found: self._address(found[0]), text)
        text = _IPV4.sub(lambda found: self._address(found[0]), text)
        for name, instead in self._names:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, text)
        return text

    def document(self, found: Any) -> Any:
        """A JSON document without them, in keys and values."""
        match found:
            case str():
                return self.text(found)
            case dict():
                entries = cast("dict[str, Any]", found).items()
                return {self.text(key): self.document(value) for key, value in entries}
            case list():
                return [self.document(each) for each in cast("list[object]", found)]
            case _:
                return found

    def _host(self, host: str) -> str:
        with suppress(ValueError):
            ipaddress.ip_address(host)
            return host  # an address, which is removed as one
        return host if host == "localhost" else self._numbered("name", host)

    def _address(self, text: str) -> str:
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:  # a time, a version, a hash; or a colon that belongs to the sentence
            rest = text.removesuffix(":")
            return text if rest == text or rest.endswith(":") else f"{self._address(rest)}:"
        if address.is_loopback or address.is_unspecified:
            return text
        return self._numbered("private address" if address.is_private else "address", text)

    def _numbered(self, kind: str, found: str) -> str:
        numbers = self._numbers.setdefault(kind, {})
        return f"<{kind} {numbers.setdefault(found, len(numbers) + 1)}>"


def own_names() -> list[tuple[str, str]]:
    """This user's home folder and name, and the computer's name, each with what stands for it."""
    found: list[tuple[str, str]] = []
    with suppress(RuntimeError):
        home = str(Path.home())
        found += [(home, "~")] if len(home) >= _LEAST_NAME else []
    with suppress(OSError, KeyError):  # a user id without an account
        found.append((getpass.getuser(), "<user>"))
    host = platform.node()
    found += [(host, "<computer>"), (host.partition(".")[0], "<computer>")]
    return [(name, instead) for name, instead in found if len(name) >= _LEAST_NAME]
