"""Ports of the last run, which a node listens on again, since its peers have noted them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

from p2pinfer.errors import AddressUnusable
from p2pinfer.folders import write_private
from p2pinfer.node.transport.addresses import check_listen, parse_tcp, without_missing_ipv6

logger = logging.getLogger(__name__)

FILE_NAME: Final = "ports.json"
_MAX_BYTES: Final = 1 << 12


def with_last_ports(listen: Sequence[str], data_dir: Path) -> tuple[str, ...]:
    """`listen`, with the port of last time in place of 0 where it is free; where it is not, that is said."""
    last = _read(data_dir / FILE_NAME)
    chosen: list[str] = []
    for address in without_missing_ipv6(listen):
        port = last.get(_place(address)) if _is_any_port(address) else None
        if port is not None:
            usual = f"{_place(address)}/tcp/{port}"
            try:
                check_listen([usual])
                address = usual
            except AddressUnusable as exc:
                logger.warning("%s; this node used that port last time and takes another one", exc)
        chosen.append(address)
    return tuple(chosen)


def remember_ports(data_dir: Path, listening: Sequence[str]) -> None:
    """Note them for `with_last_ports`. What cannot be written is said and does no harm."""
    path = data_dir / FILE_NAME
    ports = {**_read(path), **{_place(address): parse_tcp(address)[2] for address in listening}}
    if ports == _read(path):
        return
    try:
        write_private(path, json.dumps(ports).encode("ascii"))
    except OSError as exc:
        logger.warning("cannot save the listening ports in %s: %s", path, os.strerror(exc.errno or 0))


def _place(address: str) -> str:
    """An address to listen on, without its port."""
    protocol, host, _, _ = parse_tcp(address)
    return f"/{protocol}/{host}"


def _is_any_port(address: str) -> bool:
    try:
        return parse_tcp(address)[2] == 0
    except ValueError:  # whoever opens it says what is wrong with it
        return False


def _read(path: Path) -> dict[str, int]:
    """Ports by place; a damaged note counts as none."""
    try:
        with path.open("rb") as file:
            noted: Any = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError):
        return {}
    if not isinstance(noted, dict):
        return {}
    entries = cast("dict[str, object]", noted).items()
    return {place: port for place, port in entries if isinstance(port, int) and 0 < port <= 65535}
