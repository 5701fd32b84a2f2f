"""Persistence of a ledger while a program runs: records at once, writes to disk in a thread."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from p2pinfer.errors import LocalError
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.reputation.ledger import Ledger, open_ledger

logger = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 1.0  # what a kill -9 may cost; also how late other processes' bans are heard of


@asynccontextmanager
async def kept_ledger(data_dir: Path) -> AsyncGenerator[Ledger]:
    """The data directory's ledger, written every second and when the block ends.

    Where it cannot be kept, a warning says so and it lives in memory: nobody's text should suffer.
    """
    ledger = await trio.to_thread.run_sync(open_ledger, data_dir)
    ledger.advance(time.time())
    try:
        async with open_nursery() as nursery:
            nursery.start_soon(_keep, ledger)
            yield ledger
    finally:
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(ledger.close)
            except LocalError as exc:
                logger.warning("%s; the last observations of peers are lost", exc)


async def _keep(ledger: Ledger) -> None:
    failed = False
    while True:
        await trio.sleep(FLUSH_INTERVAL_S)
        try:
            await trio.to_thread.run_sync(ledger.flush)
            failed = False
        except LocalError as exc:
            if not failed:  # once, not every second
                logger.warning("%s; trying again", exc)
            failed = True
