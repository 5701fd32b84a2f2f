"""Says wrong things to a node, so many a second, over every protocol it answers: a process of its own.

Prints a JSON object at its end: frames by protocol, and how many streams were turned away. It is several
peers in turn, so that what one of them is held against does not protect the node from the others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import trio
from libp2p.identity.identify.pb.identify_pb2 import Identify

from p2pinfer.errors import PeerError
from p2pinfer.node.host.host import Host, HostConfig, open_host
from p2pinfer.node.transport.delimited import receive_message
from p2pinfer.node.transport.identity import Identity, new_identity

from .mutate import Conversation, Frame, conversations, mutate

IDENTIFY: Final = "/ipfs/id/1.0.0"
AT_ONCE: Final = 32  # streams
LISTEN_S: Final = 0.05  # for what the node says to it
FRAMES_OF_ONE: Final = 2000  # then the attacker comes back as somebody else


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.attacker")
    parser.add_argument("--peer", required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--revision", required=True)
    parser.add_argument("--hidden-size", type=int, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--frames", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True, help="frames a second")
    parser.add_argument("--seed", type=int, required=True)
    asked = parser.parse_args()
    os.nice(10)  # it stands for a machine elsewhere, and shall not take this one's processors
    attack = Attack(asked)
    trio.run(attack.run)
    print(json.dumps({"frames": attack.frames, "turned_away": attack.turned_away}), flush=True)


class Attack:
    """So many mutated frames.

    Attributes:
        frames: Sent whole, by protocol.
        turned_away: Streams that the node did not take.
    """

    def __init__(self, asked: Any) -> None:
        self.frames: Counter[str] = Counter()
        self.turned_away = 0
        self._asked = asked
        self._rng = random.Random(asked.seed)

    async def run(self) -> None:
        while self.frames.total() < self._asked.frames:
            identity = new_identity()
            async with open_host(identity, HostConfig(listen=())) as host:
                try:
                    await host.connect(self._asked.peer, [self._asked.address])
                    await self._be_somebody(host, await self._talks(host, identity))
                except PeerError:
                    self.turned_away += 1
                    await trio.sleep(0.5)

    async def _talks(self, host: Host, identity: Identity) -> list[Conversation]:
        """Conversations on every protocol that the node says it speaks."""
        asked = self._asked
        stream = await host.open_stream(asked.peer, IDENTIFY)
        with trio.fail_after(10):
            told = await receive_message(stream, Identify)
        await stream.aclose()
        known = conversations(
            asked.revision, asked.hidden_size, asked.blocks, asked.peer, asked.address, identity
        )
        talks = [each for each in known if each.protocol in told.protocols]
        for protocol in set(told.protocols) - {each.protocol for each in talks}:
            guesses = [Frame("u32", b"\x91\xa1x"), Frame("varint", b"\x08\x01"), Frame("raw", bytes(64))]
            talks += [Conversation(protocol, (guess,)) for guess in guesses]
        return talks

    async def _be_somebody(self, host: Host, talks: Sequence[Conversation]) -> None:
        until = min(self._asked.frames, self.frames.total() + FRAMES_OF_ONE)
        limit = trio.CapacityLimiter(AT_ONCE)
        due = trio.current_time()
        async with trio.open_nursery() as nursery:
            while self.frames.total() + limit.borrowed_tokens < until:
                talk = self._rng.choice(talks)
                await limit.acquire_on_behalf_of(talk_of := object())
                nursery.start_soon(self._converse, host, talk, limit, talk_of)
                due = max(due + 1 / self._asked.rate, trio.current_time() - 1)
                await trio.sleep_until(due)

    async def _converse(
        self, host: Host, talk: Conversation, limit: trio.CapacityLimiter, talk_of: object
    ) -> None:
        """Some frames as they should be, one that is not, and perhaps what would have followed."""
        rng = self._rng
        at = rng.randrange(len(talk.frames))
        before = b"".join(frame.encode() for frame in talk.frames[:at])
        after = b"".join(frame.encode() for frame in talk.frames[at + 1 :]) if rng.random() < 0.5 else b""
        try:
            stream = await host.open_stream(self._asked.peer, talk.protocol)
            try:
                await stream.send_all(before + mutate(talk.frames[at], rng) + after)
                self.frames[talk.protocol] += 1
                with trio.move_on_after(LISTEN_S):
                    while await stream.receive_some():
                        pass
            finally:
                await (stream.aclose() if rng.random() < 0.5 else stream.reset())
        except PeerError:
            self.turned_away += 1
        finally:
            limit.release_on_behalf_of(talk_of)


if __name__ == "__main__":
    main()
