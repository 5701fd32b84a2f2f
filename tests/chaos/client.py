"""A client that never stops asking: one generation after the other, each said when it begins and ends.

One in five is left in the middle and goes on by its resume token. A SIGUSR1 ends the client when what it is
at is done; the end of its standard input ends it at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from p2pinfer.client import Client, ClientConfig
from p2pinfer.errors import P2PInferError
from p2pinfer.generation.generation import Generation

from .requests import make_requests

PAUSE_S = (0.5, 3.0)  # between two generations: the machine is shared with a dozen processes
LEFT = 0.2  # share of generations that are left and resumed


def main(argv: Sequence[str]) -> None:
    """Run until asked to stop; does not return."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bootstrap", action="append", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--wait", type=float, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--hold", type=int, metavar="N", help="open N generations and do no more")
    asked = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(created).3f %(levelname)s %(name)s: %(message)s")
    logging.getLogger("p2pinfer").setLevel(logging.DEBUG)
    trio.run(_run, asked)
    os._exit(0)


async def _run(asked: Any) -> None:
    rng = random.Random(asked.seed)
    stopping = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch_signals, stopping)
        nursery.start_soon(_end_with_stdin)
        config = ClientConfig(policy="spread", wait_s=asked.wait, find_timeout_s=asked.wait, dtype="float32")
        client = Client(bootstrap=asked.bootstrap, config=config, cache_dir=asked.home, data_dir=asked.home)
        async with client:
            await client.member.reach_somebody(asked.wait)
            if asked.hold:
                held = [client.generate(f"Once {index}") for index in range(asked.hold)]
                for generation in held:
                    await anext(generation)
                _say(event="holding")
                await trio.sleep_forever()
            requests = make_requests()
            while not stopping.is_set():
                index = rng.randrange(len(requests))
                await _generate(client, requests[index].prompt, index, rng.random() < LEFT)
                with trio.move_on_after(rng.uniform(*PAUSE_S)):
                    await stopping.wait()
        nursery.cancel_scope.cancel()


async def _generate(client: Client, prompt: str, index: int, is_left: bool) -> None:
    _say(event="began", request=index)
    stalls = [0.0]
    failovers = 0
    began = time.monotonic()
    try:
        generation = client.generate(prompt, make_requests()[index].config)
        if is_left:
            await _read(generation, stalls, 8)
            failovers += generation.result.failovers
            await generation.aclose()
            if (token := generation.resume_token) is not None:
                generation = client.resume(token)
        await _read(generation, stalls)
    except P2PInferError as exc:
        _say(event="failed", request=index, error=f"{type(exc).__name__}: {exc}")
        return
    result = generation.result
    _say(
        event="ended",
        request=index,
        ids=list(result.token_ids),
        failovers=failovers + result.failovers,
        resumed=is_left,
        seconds=round(time.monotonic() - began, 3),
        stall_s=round(max(stalls), 3),
    )


async def _read(generation: Generation, stalls: list[float], most: int = 1 << 20) -> None:
    """Take up to so many tokens, noting how long each but the first took."""
    last = None
    async for _ in generation:
        now = time.monotonic()
        if last is not None:
            stalls.append(now - last)
        last = now
        most -= 1
        if not most:
            return


async def _watch_signals(stopping: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        async for _ in signals:
            stopping.set()


async def _end_with_stdin() -> None:
    def wait_for_the_end() -> None:
        while os.read(0, 1):
            pass

    await trio.to_thread.run_sync(wait_for_the_end, abandon_on_cancel=True)
    os._exit(0)


def _say(**event: Any) -> None:
    print(json.dumps({**event, "at": time.time()}), flush=True)
