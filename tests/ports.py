"""Ports for what is to listen at an address that is known beforehand."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from functools import cache

# Below what systems give to whoever asks for any port: on Linux from 32768 on, elsewhere from 49152. One of
# those could be given to another process between the question and its use.
_LOWEST, _HIGHEST = 16384, 32767


def free_port() -> int:
    """A TCP port of loopback that nobody listens on, and that only who names it gets; each one once."""
    for port in _numbers():
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("all ports are taken")


@cache
def _numbers() -> Iterator[int]:
    """This process's own order, or processes that ask at the same time would get the same ones."""
    return iter(random.SystemRandom().sample(range(_LOWEST, _HIGHEST + 1), _HIGHEST + 1 - _LOWEST))
