"""Access to the API: keys, and the names and pages that a browser must come by.

A page of a stranger can make a browser send requests to this computer. Two headers that it cannot change
give it away: Host has the page's own name where that name was made to lead here (DNS rebinding), and Origin
names the page.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from p2pinfer.errors import ConfigError
from p2pinfer.text_files import read_text

from .config import ApiConfig
from .errors import ApiError

logger = logging.getLogger(__name__)

_LEAST_CHARS: Final = 16
ANYBODY: Final = ""  # the key of those who need none


def load_keys(config: ApiConfig) -> tuple[str, ...]:
    """API keys of the configured file; none if there is no file.

    Raises:
        ConfigError: It cannot be read, holds no key or one that is too short; or others can reach the
            address, and no file is given.
    """
    if config.key_file is None:
        if not is_loopback(config.host):
            raise ConfigError(
                f"others can reach {config.host}, so a key is required: write one into a file, such as that "
                "of `openssl rand -hex 16`, and give the file as --api-key-file"
            )
        return ()
    try:
        lines = [line.strip() for line in read_text(config.key_file).splitlines()]
    except (OSError, ValueError) as exc:
        raise ConfigError(f"the file of API keys cannot be read: {exc}") from exc
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"{config.key_file} holds no API key; write one per line")
    if any(len(key) < _LEAST_CHARS or not key.isascii() or not key.isprintable() for key in keys):
        raise ConfigError(
            f"{config.key_file} holds an API key that is shorter than {_LEAST_CHARS} characters, or has "
            "others than ASCII; make one by `openssl rand -hex 16`"
        )
    _warn_of_readers(config.key_file)
    return keys


def is_loopback(host: str) -> bool:
    """True if only this computer reaches that address or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Access:
    """Decides about requests by their headers."""

    def __init__(self, keys: Sequence[str], config: ApiConfig) -> None:
        self._keys = tuple(keys)
        self._names = frozenset(name.lower().rstrip(".") for name in (config.host, *config.host_names))
        self._origins = frozenset(origin.rstrip("/") for origin in config.origins)

    def check_page(self, headers: Mapping[str, str]) -> None:
        """Nothing, if no page of a stranger is behind the request.

        Raises:
            ApiError: One may be.
        """
        host = _name_of(headers.get("host", ""))
        if not self._is_known(host):
            raise ApiError(
                f"this server is not called {host[:200]!r}; if it is, name it by --set api.host_names=NAME",
                "forbidden",
            )
        origin = headers.get("origin")
        if origin is not None and self.allowed_origin(headers) is None:
            raise ApiError(
                f"pages of {origin[:200]!r} may not call this server; allow them by --set api.origins=ORIGIN",
                "forbidden",
            )

    def allowed_origin(self, headers: Mapping[str, str]) -> str | None:
        """Origin of the page behind the request if it may read the answer; None if there is no such page."""
        origin = headers.get("origin", "")
        same = origin in (f"http://{headers.get('host')}", f"https://{headers.get('host')}")
        return origin if origin in self._origins or same else None

    def check_key(self, headers: Mapping[str, str]) -> str:
        """The key of a request; `ANYBODY` where none is needed.

        Raises:
            ApiError: It has none, or a wrong one.
        """
        if not self._keys:
            return ANYBODY
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        found = [key for key in self._keys if hmac.compare_digest(key.encode(), given.encode())]
        if not found:
            raise ApiError(
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY` or `x-api-key: KEY`",
                "authentication",
            )
        return found[0]

    def _is_known(self, host: str) -> bool:
        if host in self._names or host == "localhost" or host.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(host)  # no name, so none that could lead elsewhere in the next second
        except ValueError:
            return False
        return True


def _name_of(host: str) -> str:
    """Name or address in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower().rstrip(".")


def _warn_of_readers(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if mode & 0o004:
        logger.warning("%s can be read by every user of this computer; chmod 600 it", path)
