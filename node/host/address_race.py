"""Race of a peer's addresses: dials them and keeps the one that answers first."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio


async def race(
    addresses: Sequence[str],
    attempt: Callable[[str], Awaitable[None]],
    stagger_s: float,
    errors: dict[str, Exception],
    *,
    detours: Sequence[str] = (),
    head_start_s: float = 0.0,
    more: trio.MemoryReceiveChannel[str] | None = None,
) -> None:
    """Try `addresses` in order, each `stagger_s` after the one before or as soon as that failed.

    The first attempt that returns wins, and the others are cancelled. As in RFC 8305, section 5.

    Args:
        errors: Filled with what became of each address that failed; if the race is cancelled, so far.
        detours: Tried likewise, once all of `addresses` have failed or have had `head_start_s` to themselves.
        more: Gives addresses that become known meanwhile, each tried at once.
    """
    fates: list[trio.Event] = []  # of all attempts: set when one has failed

    async def run(address: str, failed: trio.Event) -> None:
        try:
            await attempt(address)
        except Exception as exc:  # whatever it is, it is this address's trouble
            errors[address] = exc
            failed.set()
        else:
            nursery.cancel_scope.cancel()

    async def start(addresses: Sequence[str]) -> None:
        for address in addresses:
            failed = begin(address)
            with trio.move_on_after(stagger_s):
                await failed.wait()

    def begin(address: str) -> trio.Event:
        fates.append(failed := trio.Event())
        nursery.start_soon(run, address, failed)
        return failed

    async def all_failed() -> None:
        while alive := [failed for failed in fates if not failed.is_set()]:
            await alive[0].wait()

    async def take_more(more: trio.MemoryReceiveChannel[str]) -> None:
        async for address in more:
            begin(address)

    async with trio.open_nursery() as nursery:
        if more is not None:
            nursery.start_soon(take_more, more)
        await start(addresses)
        with trio.move_on_after(head_start_s):
            await all_failed()
        await start(detours)
        await all_failed()
        nursery.cancel_scope.cancel()
