"""p2pinfer in asyncio's loop, over a swarm in memory."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import p2pinfer
from p2pinfer.client import Client
from p2pinfer.loops.asyncio_client import AsyncioClient, AsyncioGeneration
from p2pinfer.loops.blocking import BlockingClient
from p2pinfer.models.checkpoint.checkpoint import Checkpoint

from ..memory_client import open_memory_client
from ..node.memory_swarm import MemorySwarm

PROMPT = "Once upon a time"
TEXT = ", there was a little girl named Lily. She loved to play"
OpenClient = Callable[[], AbstractAsyncContextManager[Client]]


@pytest.fixture
def swarms() -> list[MemorySwarm]:
    """The swarms that clients were opened in."""
    return []


@pytest.fixture
def open_client(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, swarms: list[MemorySwarm]
) -> OpenClient:
    """Opens a client of two peers in memory; to be called in trio's loop."""

    @asynccontextmanager
    async def opened() -> AsyncGenerator[Client]:
        async with open_memory_client(checkpoint, monkeypatch, tmp_path) as (client, swarm):
            await swarm.serve("a", 0, 5)
            await swarm.serve("b", 5, 8)
            swarms.append(swarm)
            yield client

    return opened


def client_of(open_client: OpenClient) -> AsyncioClient:
    return AsyncioClient(lambda: BlockingClient(open_client))


async def begun(swarm: AsyncioClient, tokens: int = 900) -> AsyncioGeneration:
    generation = swarm.generate(PROMPT, max_new_tokens=tokens, temperature=0)
    await anext(generation)
    return generation


async def all_closed(swarms: list[MemorySwarm], swarm: AsyncioClient) -> None:
    """Return when no peer has a session any more; the swarm itself says if that takes too long."""
    await asyncio.wrap_future(swarm._client.thread.submit(swarms[0].all_closed))  # pyright: ignore[reportPrivateUsage]


def test_texts_come_token_by_token_or_whole_and_side_by_side(open_client: OpenClient) -> None:
    async def main() -> None:
        async with client_of(open_client) as swarm:
            generation = swarm.generate(PROMPT, max_new_tokens=13, temperature=0)
            with pytest.raises(p2pinfer.LocalError, match="has not begun"):
                generation.result  # noqa: B018 - it raises
            assert generation.resume_token is None
            pieces = [token.text async for token in generation]
            assert ("".join(pieces), len(pieces)) == (TEXT, 13)
            assert generation.result.finish_reason == "length"
            texts = [swarm.generate(PROMPT, max_new_tokens=13, temperature=0).text() for _ in range(3)]
            assert await asyncio.gather(*texts) == [TEXT] * 3
            assert generation.resume_token is not None
            assert (await swarm.resume(generation.resume_token, 2).text()).startswith(TEXT)
            assert sorted(str(peer.announcement.span) for peer in await swarm.peers()) == ["0:5", "5:8"]
            assert swarm.chat_template is None

    asyncio.run(main())


@pytest.mark.parametrize("way", ["aclose", "async with", "forgotten"])
def test_a_text_that_is_left_leaves_nothing_behind(
    way: str, open_client: OpenClient, swarms: list[MemorySwarm]
) -> None:
    async def main() -> None:
        async with client_of(open_client) as swarm:
            generation = await begun(swarm)
            if way == "aclose":
                await generation.aclose()
                await generation.aclose()
            elif way == "async with":
                async with generation:
                    await anext(generation)
            else:
                del generation
                gc.collect()
            await all_closed(swarms, swarm)

    asyncio.run(main())


def test_whoever_gives_up_waiting_loses_no_token(open_client: OpenClient) -> None:
    async def main() -> None:
        async with client_of(open_client) as swarm:
            generation = swarm.generate(PROMPT, max_new_tokens=40, temperature=0)
            ids: list[int] = []
            while len(ids) < 40:
                waiting = asyncio.ensure_future(anext(generation))
                for _ in range(len(ids) % 4):  # more or less of its way
                    await asyncio.sleep(0)
                if waiting.done() or len(ids) % 3:
                    ids.append((await waiting).id)
                    continue
                waiting.cancel()
                await asyncio.wait([waiting])
                ids.append((await anext(generation)).id)
            assert tuple(ids) == generation.result.token_ids

    asyncio.run(main())


def test_errors_come_out_where_it_is_awaited(open_client: OpenClient, swarms: list[MemorySwarm]) -> None:
    async def main() -> None:
        swarm = client_of(open_client)
        with pytest.raises(p2pinfer.LocalError, match="not open yet"):
            swarm.generate(PROMPT)
        async with swarm:
            with pytest.raises(p2pinfer.PromptTooLong):
                await swarm.generate("word " * 2000).text()
            with pytest.raises(p2pinfer.LocalError, match="adapter"):
                await swarm.load_adapter("no/such/folder")
            left = await begun(swarm)
        with pytest.raises(p2pinfer.LocalError, match="this client is closed"):
            async for _ in left:
                pass
        with pytest.raises(p2pinfer.LocalError, match="this client is closed"):
            await swarm.generate(PROMPT).text()

    asyncio.run(main())


def test_opening_can_be_given_up(tmp_path: Path) -> None:
    ended: list[bool] = []

    @asynccontextmanager
    async def opened() -> AsyncGenerator[Any]:
        try:
            yield None
        finally:
            ended.append(True)

    async def main() -> None:
        opening = asyncio.ensure_future(AsyncioClient(lambda: BlockingClient(opened)).__aenter__())
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        while not ended:
            await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_notebook_can_connect_without_await(open_client: OpenClient) -> None:
    async def main() -> None:  # a cell runs within a running loop
        with BlockingClient(open_client) as swarm:
            assert swarm.generate(PROMPT, max_new_tokens=13, temperature=0).text() == TEXT

    asyncio.run(main())
