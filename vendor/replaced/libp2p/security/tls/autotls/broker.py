"""AutoTLS' broker of names, refused, as is all of it: see acme.py."""

from __future__ import annotations


class BrokerClient:
    def __init__(self, *_: object, **__: object) -> None:
        raise RuntimeError("p2pinfer has no use for AutoTLS: leave it off")
