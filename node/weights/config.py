"""Settings of weights that travel between peers, apart from the rest so that reading them imports nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from p2pinfer.errors import ConfigError

SHARING: Final = ("open", "all", "none")


@dataclass(frozen=True, slots=True)
class WeightsConfig:
    """Limits on what a node gives other peers of its weights, and takes from them.

    A megabyte a second is what a node relays by default too: half of a home line's upload, and less than a
    tenth of the event loop. In a local network 250 MB/s is two gigabits, and a sixth of a core.
    """

    # models that peers may have: "open", those that anybody can have without a password; "all"; "none"
    share: str = "open"
    take: bool = True  # ask peers for weights: those nearby before the hub, others where it does not answer
    upload_bytes_per_s: int = 1_000_000  # to all peers beyond the local network together; 0: nothing
    lan_bytes_per_s: int = 250_000_000  # to all peers of the local network together; 0: nothing
    download_bytes_per_s: int = 0  # from all peers together; 0: as fast as it comes
    uploads: int = 16  # answers to peers at once, of the local network and of others each; 16 at least
    plain: bool = True  # in a local network, and with no swarm key, send weights without encryption
    patience_s: float = 60.0  # how long a download waits for a peer that has what is missing, seconds

    def __post_init__(self) -> None:
        if self.share not in SHARING:
            raise ConfigError(f"unknown weights.share {self.share!r}; choose one of {', '.join(SHARING)}")
        for name in ("upload_bytes_per_s", "lan_bytes_per_s", "download_bytes_per_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.uploads < 16 or self.patience_s <= 0:
            raise ValueError("uploads must be 16 or more, and patience_s above 0")
