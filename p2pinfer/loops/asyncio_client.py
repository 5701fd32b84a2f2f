"""Client for asyncio: trio's loop runs in a thread of its own, and tokens come over from there.

What that costs: a thread, and a way there and back for each token (benchmarks/asyncio_client.py measures it:
a tenth of a millisecond). Tokens that come faster than they are read come over together.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar, Unpack

from p2pinfer.client import Client, PeerView
from p2pinfer.errors import LocalError
from p2pinfer.generation.generation import Generation, GenerationConfig, GenerationResult, Token
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.text.chat_template import ChatPrompt, ChatTemplate
from p2pinfer.node.host_config import HostConfig
from p2pinfer.options import ClientOptions, GenerationOptions, suggesting
from p2pinfer.routing.policy import RoutingPolicy
from p2pinfer.session.terms import SessionAdapter

from .blocking import BlockingClient, connect
from .trio_thread import Pump, TrioThread

_Result = TypeVar("_Result")


@suggesting
def connect_asyncio(
    *,
    model: str | Path = BUNDLED_MODEL,
    bootstrap: str | Sequence[str] = (),
    policy: str | RoutingPolicy | None = None,
    host_config: HostConfig | None = None,
    **options: Unpack[ClientOptions],
) -> AsyncioClient:
    """A client for asyncio; use as `async with p2pinfer.connect_asyncio() as swarm`.

    Args:
        options: These and all others are those of `connect`, also that it starts nodes if there is no swarm.

    Raises (on entering):
        As entering a `Client` does.
    """
    return AsyncioClient(
        partial(connect, model=model, bootstrap=bootstrap, policy=policy, host_config=host_config, **options)
    )


class AsyncioClient:
    """A `Client` for asyncio. Made by `connect_asyncio`."""

    def __init__(self, open_client: Callable[[], BlockingClient]) -> None:
        self._open_client = open_client
        self._opened: BlockingClient | None = None

    async def __aenter__(self) -> AsyncioClient:
        opening = asyncio.ensure_future(asyncio.to_thread(self._open_client))
        try:
            self._opened = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_when_opened)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self._client.close)

    @property
    def _client(self) -> BlockingClient:
        if self._opened is None:
            raise LocalError("this client is not open yet: async with p2pinfer.connect_asyncio(...) as swarm")
        return self._opened

    @property
    def chat_template(self) -> ChatTemplate | None:
        """Chat template of the model; see `Client.chat_template`. Its `render` blocks for a millisecond."""
        return self._client.thread.client.chat_template

    def generate(
        self,
        prompt: str | ChatPrompt,
        config: GenerationConfig | None = None,
        *,
        adapter: SessionAdapter | None = None,
        **overrides: Unpack[GenerationOptions],
    ) -> AsyncioGeneration:
        """Continue `prompt`; see `Client.generate`, whose errors come with the first token."""
        return AsyncioGeneration(
            self._client.thread,
            lambda client: client.generate(prompt, config, adapter=adapter, **overrides),
        )

    def resume(
        self, token: str, max_new_tokens: int | None = None, adapter: SessionAdapter | None = None
    ) -> AsyncioGeneration:
        """Go on with a generation that stopped; see `Client.resume`; errors come with the first token."""
        return AsyncioGeneration(
            self._client.thread, lambda client: client.resume(token, max_new_tokens, adapter)
        )

    async def load_adapter(self, folder: str | Path) -> SessionAdapter:
        """LoRA in peft's files, for `generate`; see `Client.load_adapter`."""
        thread = self._client.thread
        return await _other_loop(thread.submit(lambda: thread.client.load_adapter(folder)))

    async def peers(self) -> list[PeerView]:
        """Peers known to serve the model."""
        thread = self._client.thread

        async def ask() -> list[PeerView]:
            return thread.client.peers()

        return await _other_loop(thread.submit(ask))


class AsyncioGeneration:
    """An asynchronous iterator of `Token`s; `result` tells what came of it, also before the end.

    Use it as `async with` if it may be left before its end, so that the hops free at once what they hold.
    """

    def __init__(self, thread: TrioThread, begin: Callable[[Client], Generation]) -> None:
        self._thread = thread
        self._begin = begin
        self._generation: Generation | None = None
        self._pump: Pump | None = None
        self._ready: deque[Token] = deque()

    async def __aenter__(self) -> AsyncioGeneration:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncIterator[Token]:
        return self

    async def __anext__(self) -> Token:
        """The next token; raises as `Generation.__anext__` does."""
        if not self._ready:
            await _other_loop(self._thread.submit(self._fetch))
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.popleft()

    @property
    def result(self) -> GenerationResult:
        """Result so far; whole once the iteration has ended.

        Raises:
            LocalError: No token was asked for yet.
        """
        if self._generation is None:
            raise LocalError("this generation has not begun: iterate over it, or await its text()")
        return self._generation.result

    @property
    def resume_token(self) -> str | None:
        """Token for `resume` to go on from here; None if nothing is left to do, or was begun."""
        return None if self._generation is None else self._generation.resume_token

    async def text(self) -> str:
        """All of the text, once it is there."""
        async for _ in self:
            pass
        return self.result.text

    async def aclose(self) -> None:
        """End it early, so that the hops free what they hold for it. Harmless twice."""
        pump = self._pump
        if pump is not None:
            self._thread.soon(pump.scope.cancel)
            await _other_loop(self._thread.submit(pump.ended.wait))

    async def _fetch(self) -> None:
        """Take what tokens there are, at least one; in trio's loop.

        They are kept here at once: whoever waits for them may give up, and ask again later.
        """
        if self._pump is None:
            self._generation = self._begin(self._thread.client)
            self._pump = Pump(self._generation)
            weakref.finalize(self, self._thread.soon, self._pump.scope.cancel)
            self._thread.start(self._pump.run)
        self._ready.extend(await self._pump.more())


async def _other_loop(told: Future[_Result]) -> _Result:
    """Result of something in trio's loop."""
    return await asyncio.wrap_future(told)


def _close_when_opened(opening: asyncio.Future[BlockingClient]) -> None:
    """Nobody waits for the client any more; its thread is to end all the same."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().thread.stop()
