"""A place where fraud proofs are published and heard of."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
import trio

from p2pinfer.node.concurrency.nurseries import open_nursery

from .proof_board import Place


@pytest.fixture
async def place() -> AsyncGenerator[Place]:
    async with open_nursery() as nursery:
        with trio.fail_after(30):
            yield Place(nursery)
