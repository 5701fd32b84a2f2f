"""A crowd that attacks one node with nothing but well-formed messages: a process of its own.

Fifty identities of ten address ranges (127.0.1.0/24 and so on, which on Linux all lead here), all kinds of
`attacks` at once. Whoever is hung up on comes back as somebody else. Perhaps one more is a bootstrap node,
which tells whoever asks it of nobody but peers that it has invented.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Final

import trio
from libp2p.exceptions import BaseLibp2pError

from p2pinfer.errors import PeerError
from p2pinfer.node.host.host import HostConfig, open_host
from p2pinfer.node.host.length_prefix import receive_value, send_value
from p2pinfer.node.swarm.snapshot import SNAPSHOT_PROTOCOL, encode_response
from p2pinfer.node.transport.identity import load_identity, new_identity

from .attacks import KINDS, Attack, Attacker, Target
from .inventions import Inventor

RANGES: Final = 10
BACK_S: Final = 1.0  # before whoever was hung up on comes back
TOLD: Final = 300  # invented peers of which the bootstrap node tells


class Crowd:
    """All of them."""

    def __init__(
        self,
        target: Target,
        kinds: Sequence[str],
        identities: int,
        bootstrap: tuple[Path, str] | None = None,
    ) -> None:
        """Set up; nobody comes before `run`.

        Args:
            kinds: Of attacks, keys of `KINDS`.
            bootstrap: Folder of the bootstrap node's identity, and where it listens.
        """
        self._target = target
        self._identities = identities
        self._bootstrap = bootstrap
        every = chain.from_iterable(zip_longest(*(KINDS[kind] for kind in kinds)))  # kinds in turns
        self._attacks = [attack for attack in every if attack is not None]

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            if self._bootstrap is not None:
                nursery.start_soon(self._introduce, *self._bootstrap)
            for number in range(self._identities):
                source = f"127.0.{number % RANGES + 1}.{number // RANGES + 1}"
                attack = self._attacks[number % len(self._attacks)]
                nursery.start_soon(self._come_back, source, attack, self._inventor(number))

    def _inventor(self, seed: int) -> Inventor:
        return Inventor(self._target.revision, self._target.blocks, self._target.victims, seed)

    async def _come_back(self, source: str, attack: Attack, inventor: Inventor) -> None:
        target = self._target
        while True:
            identity = new_identity()
            try:
                async with open_host(identity, HostConfig(listen=(), upnp=False, mdns=False)) as host:
                    await host.dial_from(target.peer_id, target.address, (source, 0), responding=False)
                    await attack(Attacker(target, host, identity, inventor))
            except* (PeerError, BaseLibp2pError, OSError, trio.ClosedResourceError):
                pass
            await trio.sleep(BACK_S)

    async def _introduce(self, home: Path, address: str) -> None:
        inventor = self._inventor(-1)
        told = encode_response([(inventor.invent().record, 0.0) for _ in range(TOLD)])

        async def answer(stream: Any) -> None:
            await receive_value(stream, 1 << 16)
            await send_value(stream, told)

        config = HostConfig(listen=(address,), upnp=False, mdns=False)
        async with open_host(load_identity(home), config) as host:
            host.serve(SNAPSHOT_PROTOCOL, answer)
            await trio.sleep_forever()
