"""Certificates from an ACME server, refused. In the place of a module that imports httpx and requests.

libp2p uses them for AutoTLS, which p2pinfer never switches on: peers prove their keys themselves. They take
0.08 s of processor time and 8 MB of every process that imports libp2p.
"""

from __future__ import annotations

from typing import NoReturn

_REFUSAL = "p2pinfer has no use for AutoTLS: leave it off"


class ACMEClient:
    def __init__(self, *_: object) -> None:
        raise RuntimeError(_REFUSAL)


def compute_b36_peer_id(peerid: object) -> NoReturn:
    raise RuntimeError(_REFUSAL)
