"""What of a session that is over another one of its client may begin with."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from p2pinfer.models.compute.cache import PagedCache
from p2pinfer.node.evidence import prefixes as prefixes_module
from p2pinfer.node.evidence.prefixes import MAX_OF_CLIENT, Prefix, Prefixes
from p2pinfer.node.protocol.messages import Open, Successor
from p2pinfer.node.protocol.messages import Prefix as Asked
from p2pinfer.reputation.receipt import SignedStep, StandingSteps

OPENING = Open(b"s" * 16, "r", 0, 3, 64, "float32", successor=Successor("next"))
NEXT = msgspec.structs.replace(OPENING, session=b"t" * 16, prefix=Asked(OPENING.session, 12))


class Hop:
    """The cache and the evidence of a hop whose rows say what they are of: `i` or `o`, and a position."""

    def __init__(self) -> None:
        self.cache = PagedCache(
            layout=[(torch.device("cpu"), 1)],
            kv_heads=1,
            head_dim=2,
            dtype=torch.float32,
            budget_bytes=1 << 16,
            page_tokens=4,
        )
        self.evidence: dict[bytes, bytes] = {}
        self.prefixes = Prefixes(self.cache, self.evidence.get, 100.0)

    def step(self, position: int, tokens: int, mark: str = "") -> SignedStep:
        digests: list[bytes] = []
        for side in "io":
            content = b"".join(
                f"{side}{mark or '-'}{row:02}".encode() for row in range(position, position + tokens)
            )
            digests.append(f"{side}{mark}{position}".encode())
            self.evidence[digests[-1]] = content
        return SignedStep(position, tokens, *digests)

    def keep(self, client: str = "me", opening: Open = OPENING, now: float = 0.0) -> None:
        """Keep a session of 12 tokens, two of which took the place of others."""
        steps = StandingSteps()
        for each in (self.step(0, 5), self.step(5, 5, "x"), self.step(7, 1), self.step(8, 4)):
            steps.add(each)
        lease = self.cache.reserve(20)
        lease.length = steps.stop
        self.prefixes.keep(client, opening, lease, steps, now)

    def find(self, opening: Open = NEXT, client: str = "me", now: float = 1.0) -> Prefix | None:
        return self.prefixes.find(client, opening, now)


def piece(prefix: Prefix, position: int, tokens: int) -> tuple[bytes, bytes]:
    received, sent = prefix.piece(position, tokens)
    return bytes(received), sent


def rows(side: str, *parts: tuple[str, range]) -> bytes:
    return b"".join(f"{side}{mark}{row:02}".encode() for mark, part in parts for row in part)


def test_pieces_are_what_stood_whatever_steps_it_came_in() -> None:
    hop = Hop()
    hop.keep()
    prefix = hop.find()
    assert prefix is not None
    assert prefix.tokens == 12
    whole = (("-", range(5)), ("x", range(5, 7)), ("-", range(7, 12)))
    assert piece(prefix, 0, 12) == (rows("i", *whole), rows("o", *whole))
    assert piece(prefix, 6, 3) == tuple(rows(side, ("x", range(6, 7)), ("-", range(7, 9))) for side in "io")


def test_the_last_hop_signs_without_its_outputs() -> None:
    hop = Hop()
    last = msgspec.structs.replace(OPENING, successor=None)
    hop.keep(opening=last)
    prefix = hop.find(msgspec.structs.replace(NEXT, successor=None))
    assert prefix is not None
    assert piece(prefix, 0, 5) == (rows("i", ("-", range(5))), b"")
    assert hop.find() is None  # in the middle of a route it would need them


@pytest.mark.parametrize(
    "change",
    [
        {"revision": "other"},
        {"start": 1},
        {"stop": 2},
        {"codec": "bfloat16"},
        {"predecessor": "somebody"},
        {"prefix": Asked(b"u" * 16, 12)},
        {"prefix": None},
    ],
    ids=str,
)
def test_only_the_same_blocks_of_the_same_session_serve(change: dict[str, Any]) -> None:
    hop = Hop()
    hop.keep()
    assert hop.find() is not None
    assert hop.find(msgspec.structs.replace(NEXT, **change)) is None


def test_it_is_its_clients_alone_and_for_a_time() -> None:
    hop = Hop()
    hop.keep()
    assert hop.find(client="thief") is None
    assert hop.find(now=99.0) is not None
    assert hop.find(now=101.0) is None


def test_as_much_as_is_left_of_it_is_given() -> None:
    hop = Hop()
    hop.keep()
    shorter = hop.find(msgspec.structs.replace(NEXT, prefix=Asked(OPENING.session, 9)))
    assert shorter is not None
    assert shorter.tokens == 9
    del hop.evidence[b"o8"]
    prefix = hop.find()
    assert prefix is not None
    assert prefix.tokens == 8
    hop.cache.reserve(hop.cache.capacity_tokens).release()
    assert hop.find() is None


def test_whoever_keeps_too_many_loses_the_oldest() -> None:
    hop = Hop()
    hop.keep("other")
    for number in range(MAX_OF_CLIENT + 2):
        hop.keep(opening=msgspec.structs.replace(OPENING, session=bytes([number]) * 16))
    assert len(hop.prefixes) == MAX_OF_CLIENT + 1
    assert hop.find(client="other") is not None
    assert hop.find(msgspec.structs.replace(NEXT, prefix=Asked(bytes(16), 12))) is None
    assert hop.find(msgspec.structs.replace(NEXT, prefix=Asked(bytes([2]) * 16, 12))) is not None


def test_all_that_is_kept_has_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    hop = Hop()
    hop.keep("a")
    monkeypatch.setattr(prefixes_module, "MAX_STEPS", 2 * 4)  # of two such sessions
    hop.keep("b")
    assert len(hop.prefixes) == 2
    hop.keep("c")
    assert len(hop.prefixes) == 2
    assert hop.find(client="a") is None
    assert hop.find(client="c") is not None
