"""Thread in which a client's trio loop runs, and the ways into it from other threads and loops."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractAsyncContextManager, suppress
from typing import Final, Generic, TypeVar

import trio

from p2pinfer.client import Client
from p2pinfer.errors import LocalError, P2PInferError
from p2pinfer.generation.generation import Generation, Token
from p2pinfer.node.concurrency.nurseries import open_nursery

_Result = TypeVar("_Result")
_Opened = TypeVar("_Opened")

_TOKENS_AHEAD: Final = 64  # a slow reader holds the generation up; the hops keep its cache meanwhile
_CLOSED: Final = "this client is closed; connect again"


class Pump:
    """Iterates a generation in one trio task: cancel scopes inside it must not change tasks on the way."""

    def __init__(self, generation: Generation) -> None:
        self.scope = trio.CancelScope()
        self.failure: P2PInferError | None = None
        self._generation = generation
        self._send, self.tokens = trio.open_memory_channel[Token](_TOKENS_AHEAD)
        self.ended = trio.Event()  # and closed on every hop

    async def run(self) -> None:
        """Iterate until it ends, fails or is cancelled."""
        with self.scope, self._send:
            try:
                async for token in self._generation:
                    await self._send.send(token)
            except P2PInferError as exc:
                self.failure = exc
            finally:
                with trio.CancelScope(shield=True):
                    await self._generation.aclose()
                self.ended.set()

    async def more(self) -> list[Token]:
        """The next token, and those that are there already; none at the end. Raises what it failed with."""
        try:
            told = [await self.tokens.receive()]
        except trio.EndOfChannel:
            if self.failure is not None:
                raise self.failure from None
            return []
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            while True:
                told.append(self.tokens.receive_nowait())
        return told


class Held(Generic[_Opened]):
    """Keeps an object open in one trio task, until it or the client is closed."""

    def __init__(self, open_it: Callable[[], AbstractAsyncContextManager[_Opened]]) -> None:
        self._is_closed = False
        self._scope = trio.CancelScope()
        self._open_it = open_it
        self._result: Future[_Opened] = Future()

    def open(self, loop: TrioThread) -> None:
        """Open it, and return when it is; raises as entering it does."""
        loop.spawn(self._run)
        self._result.result()

    @property
    def opened(self) -> _Opened:
        """The object that was opened; LocalError once it is closed."""
        if self._is_closed:
            raise LocalError("this was closed; open another one")
        return self._result.result()

    def close(self) -> None:
        """Close it, some time soon; called in the loop."""
        self._is_closed = True
        self._scope.cancel()

    async def _run(self) -> None:
        with self._scope:
            try:
                async with self._open_it() as opened:
                    self._result.set_result(opened)
                    await trio.sleep_forever()
            except P2PInferError as exc:
                if self._result.done():
                    raise
                self._result.set_exception(exc)
            finally:
                _fail(self._result, LocalError(_CLOSED))


class TrioThread:
    """The thread, and the ways into it.

    Attributes:
        client: The client, once this is made.
    """

    def __init__(self, open_client: Callable[[], AbstractAsyncContextManager[Client]]) -> None:
        self._open_client = open_client
        self._closing = False
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        self._opened: Future[tuple[Client, trio.Nursery]] = Future()
        self._thread = threading.Thread(target=self._run, name="p2pinfer", daemon=True)
        self._thread.start()
        try:
            self.client, self._nursery = self._opened.result()
        except BaseException:
            self.close()
            raise

    def call(self, function: Callable[[Client], _Result]) -> _Result:
        """Result of `function`, called in the loop."""
        try:
            return trio.from_thread.run_sync(function, self.client, trio_token=self._token)
        except trio.RunFinishedError:
            raise LocalError(_CLOSED) from None

    def wait(self, function: Callable[[], Awaitable[_Result]]) -> _Result:
        """Result of `function`, awaited in the loop."""
        try:
            return trio.from_thread.run(function, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled):
            raise LocalError(_CLOSED) from None

    def submit(self, function: Callable[[], Awaitable[_Result]]) -> Future[_Result]:
        """Have `function` awaited in the loop, and do not wait; whoever cancels the future cancels it."""
        told: Future[_Result] = Future()
        scope = trio.CancelScope()

        async def run() -> None:
            with scope:
                try:
                    result = await function()
                except Exception as exc:
                    _fail(told, exc)
                except trio.Cancelled:
                    _fail(told, LocalError(_CLOSED))
                    raise
                else:
                    with suppress(InvalidStateError):  # whoever waited gave up just now
                        told.set_result(result)

        def begin() -> None:
            try:
                self._nursery.start_soon(run)
            except RuntimeError:  # the client has been closed meanwhile
                _fail(told, LocalError(_CLOSED))

        def give_up(settled: Future[_Result]) -> None:
            if settled.cancelled():
                self.soon(scope.cancel)

        told.add_done_callback(give_up)
        try:
            assert self._token is not None
            self._token.run_sync_soon(begin)
        except trio.RunFinishedError:
            _fail(told, LocalError(_CLOSED))
        return told

    def spawn(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run `function` in the background until the client is closed."""
        self.call(lambda _: self._nursery.start_soon(function))

    def start(self, function: Callable[[], Awaitable[None]]) -> None:
        """As `spawn`, from within the loop."""
        self._nursery.start_soon(function)

    def soon(self, function: Callable[[], object]) -> None:
        """Have `function` called in the loop, if that still runs; from finalizers, so it must not wait."""
        with suppress(trio.RunFinishedError):
            if self._token is not None:
                self._token.run_sync_soon(function)

    def close(self) -> None:
        """Cancel everything and wait for the thread."""
        self.stop()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def stop(self) -> None:
        """Cancel everything, without waiting for the thread to end."""
        self._closing = True
        self.soon(self._scope.cancel)

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as exc:
            if self._opened.done():
                raise
            self._opened.set_exception(exc)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            if self._closing:
                return
            async with self._open_client() as client, open_nursery() as nursery:
                self._opened.set_result((client, nursery))
                await trio.sleep_forever()


def _fail(told: Future[_Result], failure: Exception) -> None:
    with suppress(InvalidStateError):
        told.set_exception(failure)
