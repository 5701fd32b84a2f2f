"""libp2p's own UPnP, refused. In the place of a module that needs miniupnpc, which not every Python has.

p2pinfer/node/upnp.py maps ports; libp2p imports this module in any case, and makes a manager only if asked.
"""

from __future__ import annotations


class UpnpManager:
    def __init__(self) -> None:
        raise RuntimeError("p2pinfer maps ports itself: leave libp2p's UPnP off")
