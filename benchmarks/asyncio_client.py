"""What a client in asyncio's loop costs: the time of a token there, beside that in trio's own loop.

    python benchmarks/asyncio_client.py [--json]

Both generate the same text over three nodes of the bundled model on this computer, by turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from statistics import median

import p2pinfer
from p2pinfer.client_config import AuditConfig, ClientConfig

PROMPT, TOKENS, TURNS = "Once upon a time", 200, 15


async def measure(folder: str) -> dict[str, float]:
    config = ClientConfig(speculate="off", draft="off")
    swarm = p2pinfer.connect_asyncio(
        config=config, audit=AuditConfig(rate=0.0), data_dir=folder, cache_dir=folder
    )
    async with swarm:
        thread = swarm._client.thread  # pyright: ignore[reportPrivateUsage]

        async def in_trio() -> float:
            began = time.perf_counter()
            async with thread.client.generate(PROMPT, max_new_tokens=TOKENS, temperature=0) as generation:
                count = len([token async for token in generation])
            return (time.perf_counter() - began) / count

        async def in_asyncio() -> float:
            began = time.perf_counter()
            generation = swarm.generate(PROMPT, max_new_tokens=TOKENS, temperature=0)
            count = len([token async for token in generation])
            return (time.perf_counter() - began) / count

        ways: dict[str, list[float]] = {"trio": [], "asyncio": []}
        for _ in range(TURNS + 2):
            ways["trio"].append(await asyncio.wrap_future(thread.submit(in_trio)))
            ways["asyncio"].append(await in_asyncio())
    trio_ms, asyncio_ms = (median(times[2:]) * 1e3 for times in ways.values())
    return {"trio_ms": trio_ms, "asyncio_ms": asyncio_ms, "more_ms": asyncio_ms - trio_ms}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print an object")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        measured = asyncio.run(measure(folder))
    print(json.dumps(measured) if as_json else "\n".join(f"{k:12}{v:8.3f}" for k, v in measured.items()))
