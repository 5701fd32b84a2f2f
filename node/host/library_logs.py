"""Log records of libp2p, at the level they have for us.

libp2p calls it an error when a peer hangs up or does not speak a protocol, and has Python print that to
standard error past whatever logging was set up: its logger does not propagate and has no handler. What it
says becomes DEBUG records of `p2pinfer.libp2p`.
"""

from __future__ import annotations

import logging

_ours = logging.getLogger("p2pinfer.libp2p")


class _Relay(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _ours.debug("%s: %s", record.name, record.getMessage())


def adopt_libp2p_logs() -> None:
    """Route libp2p's records as described above; harmless twice."""
    theirs = logging.getLogger("libp2p")
    if not any(isinstance(handler, _Relay) for handler in theirs.handlers):
        theirs.addHandler(_Relay())
