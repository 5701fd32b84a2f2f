"""Texts with different adapters at once: tokens a second, beside as many texts without any.

    python benchmarks/adapters.py [--model 512x8] [--texts 8] [--adapters 4] [--tokens 48] [--rounds 3]

Real node processes on loopback, one client. The adapters are random LoRA of all products, of rank 8; which
text each makes is compared with that of the same adapter alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trio
from contest import blocks_of, evenly, model_folder, open_swarm, report, rounded
from quotient import compared

from p2pinfer.client import Client
from p2pinfer.learning.peft_files import save_adapter
from p2pinfer.learning.tuned_adapter import new_lora
from p2pinfer.session.terms import SessionAdapter

PROMPT = "Once upon a time there was a little girl who"


async def make_adapters(client: Client, count: int, folder: Path) -> list[SessionAdapter]:
    """Adapters whose B is not zero, in peft's files and read from them."""
    adapters: list[SessionAdapter] = []
    for index in range(count):
        made = new_lora(client.ends.architecture, client.spec.num_blocks, 8, 16.0, (), index)
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for each in made.factors[1::2]:
                each.normal_(0, 0.02, generator=generator)
        into = folder / str(index)
        into.mkdir()
        save_adapter(made, client.spec, client.ends.architecture, into)
        adapters.append(await client.load_adapter(into))
    return adapters


async def run(
    client: Client, adapters: Sequence[SessionAdapter | None], tokens: int
) -> tuple[list[tuple[int, ...]], float]:
    """Ids of one text for each adapter, all at once, and tokens a second of all together."""
    ids: list[tuple[int, ...]] = [()] * len(adapters)

    async def one(index: int) -> None:
        generation = client.generate(
            PROMPT, adapter=adapters[index], max_new_tokens=tokens, stop_ids=(), temperature=0.0
        )
        async for _ in generation:
            pass
        ids[index] = tuple(generation.result.token_ids)

    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for index in range(len(adapters)):
            nursery.start_soon(one, index)
    return ids, tokens * len(adapters) / (time.perf_counter() - started)


async def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    with model_folder(options.model) as folder, tempfile.TemporaryDirectory() as scratch:
        spans = evenly(blocks_of(folder), options.hops)
        async with open_swarm(folder, spans, options.dtype) as client:
            adapters = await make_adapters(client, options.adapters, Path(scratch))
            chosen = [adapters[index % len(adapters)] for index in range(options.texts)]
            alone = {each: (await run(client, [each], options.tokens))[0][0] for each in adapters}
            plain: list[float] = []
            tuned: list[float] = []
            alike = 0
            for _ in range(options.rounds):  # in turn, so that a busy machine slows both
                plain.append((await run(client, [None] * options.texts, options.tokens))[1])
                ids, rate = await run(client, chosen, options.tokens)
                tuned.append(rate)
                alike += sum(found == alone[each] for found, each in zip(ids, chosen, strict=True))
    return [
        {
            "model": options.model,
            "dtype": options.dtype,
            "hops": options.hops,
            "texts": options.texts,
            "adapters": options.adapters,
            "tok/s without": rounded(plain),
            "tok/s with": rounded(tuned),
            **compared([1 / rate for rate in tuned], [1 / rate for rate in plain]),
            "texts as alone": f"{alike} of {options.texts * options.rounds}",
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="512x8")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hops", type=int, default=2)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report("texts with adapters", trio.run(measure, options))


if __name__ == "__main__":
    main()
