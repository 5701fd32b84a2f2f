"""Writes down, from inside a p2pinfer process, whom it asked for and how each peer came to be connected.

What a command prints ends with what matters to its user. The lab wants to know when an edge was asked for,
when it stood relayed and when direct; a host knows that, and a thread that looks at it needs nothing of the
command.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

from p2pinfer.node.host.host import Host

LOOK_EVERY_S = 0.02


def testify(path: str) -> None:
    """Write what this process's hosts see to a file, a JSON object a line, from now on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    _asked_for(descriptor)
    made: Any = Host.__init__

    def watched(self: Host, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        _write(descriptor, self.peer_id, "host")
        threading.Thread(target=_watch, args=(self, descriptor), daemon=True).start()

    Host.__init__ = watched  # type: ignore[method-assign]


def _asked_for(descriptor: int) -> None:
    connect: Any = Host.connect
    contacted: set[str] = set()

    async def noted(self: Host, peer_id: str, addrs: Sequence[str] = (), *, hearsay: bool = False) -> None:
        if peer_id not in contacted:
            contacted.add(peer_id)
            _write(descriptor, peer_id, "contact")
        await connect(self, peer_id, addrs, hearsay=hearsay)

    Host.connect = noted  # type: ignore[method-assign]


def _watch(host: Host, descriptor: int) -> None:
    kinds: dict[str, str | None] = {}
    while True:
        try:
            seen = {peer: host.connection_kind(peer) for peer in {*kinds, *host.connected_peers()}}
        except RuntimeError:  # the other thread changed a table while this one read it; look again
            continue
        for peer, kind in seen.items():
            if kinds.get(peer) != kind:
                kinds[peer] = kind
                _write(descriptor, peer, kind or "gone")
        time.sleep(LOOK_EVERY_S)


def _write(descriptor: int, peer_id: str, what: str) -> None:
    line = json.dumps({"at": time.monotonic(), "peer": peer_id, "what": what})
    os.write(descriptor, line.encode() + b"\n")
