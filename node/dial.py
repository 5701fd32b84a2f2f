"""Reaches a peer on whichever of its addresses answers first."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

Attempt = Callable[[str], Awaitable[None]]


async def race(addresses: Sequence[str], attempt: Attempt, stagger_s: float) -> dict[str, Exception]:
    """Try `addresses` in order, each `stagger_s` after the last or as soon as that failed.

    The first attempt that returns wins and the others are cancelled. As in RFC 8305, section 5.

    Returns:
        The errors of all addresses if every one failed; nothing if one succeeded.
    """
    errors: dict[str, Exception] = {}
    won = False

    async def run(address: str, failed: trio.Event) -> None:
        nonlocal won
        try:
            await attempt(address)
        except Exception as exc:  # whatever it is, it is this address's trouble
            errors[address] = exc
            failed.set()
        else:
            won = True
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for address in addresses:
            failed = trio.Event()
            nursery.start_soon(run, address, failed)
            with trio.move_on_after(stagger_s):
                await failed.wait()
    return {} if won else errors
