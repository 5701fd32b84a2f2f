"""First token of a chat's second question against that of the first: what hops keep, and what it saves.

    python benchmarks/second_question.py                             # a quarter of an hour
    python benchmarks/second_question.py --model tiny-stories --tokens 940 --rounds 1
    python benchmarks/second_question.py --prefill-codec off int8

Hosts, lines and nodes are those of distance.py: public, one torch thread each, in the lab (so Linux, and root
or user namespaces). The client is one process, as `p2pinfer serve` is. It asks about a text of `tokens`
tokens, then again with the answer and another question behind it, then the same with nothing kept. `share` is
the time of the second first token over that of the first one, `anew` that of the last; both are medians over
rounds. `same ids` compares the second answer with the last.

`bound` is what a pipeline takes for the first question, whose text the line of the client has to carry, if a
chunk may be as short as one likes and costs no more per token for it: rows as they travel over uplink or,
where that takes longer, compute over hops, and (hops + 1) delays; and before that the round trips of an
opening, without which no step may be sent: one to the hops, and one between two of them. Compute is what
local transformers takes for the text with one thread; hops that share this machine's processors have no more
of them together.

`chunked` is the same for chunks of one length that are whole: each passes every line and every hop, and the
longest of these stages comes once for each chunk more. Compute is again that of local transformers, given the
text in such chunks: short ones cost more per token, because each reads all weights. Of the lengths the best
counts, `chunk`. `of bound` and `of chunked` are the first question's time over them. `load` is the machine's
before the first question: where it is above the number of processors, times are of a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the lab, which belongs to the tests
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

from collections.abc import Iterator, Sequence
from itertools import product
from statistics import median
from typing import Any, Final

import torch
import trio
from contest import Local, model_folder, prompt_ids, report
from distance import STORY, Chain
from pipeline import pipeline_s

from p2pinfer.client import Client
from p2pinfer.client_config import AuditConfig, ClientConfig
from p2pinfer.generation.generation import GenerationResult
from p2pinfer.models.numerics import packed_row_bytes
from tests.lab.commands import open_commands
from tests.lab.lab import open_lab
from tests.lab.namespaces import why_not
from tests.lab.pairs import leave
from tests.lab.pinned import POLICY
from tests.lab.scenario import Scenario, Site

ANSWER_TOKENS: Final = 16
QUESTION: Final = " Then he said: what"
PATIENCE_S: Final = 300.0
OPENING_ROUND_TRIPS: Final = 2
CHUNKS: Final = (16, 24, 32, 48, 64, 96, 128, 256)  # tokens


async def ask_in_turn(
    folder: str, bootstrap: str, dtype: str, tokens: int, rounds: int, codec: str
) -> list[dict[str, Any]]:
    """What the client measures."""
    config = ClientConfig(dtype=dtype, speculate="off", draft="off", find_timeout_s=60.0, prefill_codec=codec)
    client = Client(
        model=folder, bootstrap=bootstrap, policy=POLICY, config=config, audit=AuditConfig(rate=0.0)
    )
    rows: list[dict[str, Any]] = []
    async with client:
        if not await client.is_served(60.0):
            sys.exit("nobody serves the model")

        async def ask(prompt: str) -> GenerationResult:
            generation = client.generate(prompt, max_new_tokens=ANSWER_TOKENS, temperature=0.0)
            async for _ in generation:
                pass
            return generation.result

        tokenizer = client.local.tokenizer
        await ask(STORY)  # which connects
        for number in range(rounds):
            text = f"{number} " + STORY * (tokens // 10)
            text = tokenizer.decode(tokenizer.encode(text)[:tokens])
            first = await ask(text)
            longer = text + first.text + QUESTION
            second = await ask(longer)
            client._kept_texts._texts.clear()  # pyright: ignore[reportPrivateUsage]
            anew = await ask(longer)
            times = [each.timings.first_token_s for each in (first, second, anew)]
            rows.append(
                {"first_s": times, "reused": second.reused_tokens, "same": second.token_ids == anew.token_ids}
            )
    return rows


def measure(options: argparse.Namespace, name: str, hops: int) -> Iterator[dict[str, Any]]:
    """The rows of one model over so many hops."""
    hosts = (*(f"n{number}" for number in range(hops)), "me")
    scenario = Scenario("second question", "public hosts", tuple(Site(host) for host in hosts))
    with model_folder(name) as folder, open_lab(scenario) as lab, open_commands(lab) as commands:
        chain = Chain(commands, folder, options.dtype, hops)
        width = json.loads((folder / "config.json").read_text())["hidden_size"]
        row_bytes = width * torch.empty((), dtype=getattr(torch, options.dtype)).element_size()
        computed_s = _prefill_s(folder, options)
        try:
            for delay_ms, mbit, codec in product(options.delay, options.mbit, options.prefill_codec):
                chain.set_lines(delay_ms, mbit)
                load = os.getloadavg()[0]
                asked = _ask_inside(chain, folder, codec, options)
                sent_bytes = row_bytes if codec == "off" else packed_row_bytes(width)
                row_s = sent_bytes * 8 / (mbit * 1e6)
                away_s = (hops + 1 + 2 * OPENING_ROUND_TRIPS) * delay_ms / 1e3
                at_once = min(hops, os.cpu_count() or 1)
                bound_s = max(options.tokens * row_s, computed_s[options.tokens] / at_once) + away_s
                chunked_s, chunk = min(
                    (pipeline_s(options.tokens, chunk, row_s, compute_s, hops, at_once), chunk)
                    for chunk, compute_s in computed_s.items()
                )
                chunked_s += away_s
                times = [[row["first_s"][at] for row in asked] for at in range(3)]
                yield {
                    "model": name,
                    "hops": hops,
                    "delay": delay_ms,
                    "mbit": mbit,
                    "tokens": options.tokens,
                    "codec": codec,
                    "load": round(load, 1),
                    "reused": min(row["reused"] for row in asked),
                    "bound": round(bound_s, 2),
                    "first s": round(median(times[0]), 2),
                    "of bound": round(median(times[0]) / bound_s, 2),
                    "chunked": round(chunked_s, 2),
                    "chunk": chunk,
                    "of chunked": round(median(times[0]) / chunked_s, 2),
                    "second s": round(median(times[1]), 2),
                    "share": round(median(b / a for a, b in zip(times[0], times[1], strict=True)), 3),
                    "anew": round(median(b / a for a, b in zip(times[0], times[2], strict=True)), 3),
                    "same ids": all(row["same"] for row in asked),
                }
        finally:
            leave(chain.nodes)


def _prefill_s(folder: Path, options: argparse.Namespace) -> dict[int, float]:
    """Seconds that local transformers takes for the prompt, by length of the chunks; the better of two."""
    local, ids = Local(folder, options.dtype), prompt_ids(options.tokens)
    lengths = [each for each in CHUNKS if each < options.tokens]
    return {each: min(local.prefill_s(ids, each) for _ in range(2)) for each in (*lengths, options.tokens)}


def _ask_inside(chain: Chain, folder: Path, codec: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the client in its own host."""
    words = ("--inside", str(folder), chain.bootstrap, "--dtype", options.dtype, "--prefill-codec", codec)
    numbers = ("--tokens", str(options.tokens), "--rounds", str(options.rounds))
    patience_s = PATIENCE_S * options.rounds
    rows: list[dict[str, Any]] = chain.ask_inside(__file__, *words, *numbers, patience_s=patience_s)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["1024x16"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hops", nargs="+", type=int, default=[4])
    parser.add_argument("--delay", nargs="+", type=float, default=[25.0], help="ms, one way")
    parser.add_argument("--mbit", nargs="+", type=float, default=[20.0])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill-codec", nargs="+", choices=("off", "int8"), default=["off"])
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.inside:
        folder, bootstrap = options.inside
        numbers, codec = (options.tokens, options.rounds), options.prefill_codec[0]
        told = trio.run(ask_in_turn, folder, bootstrap, options.dtype, *numbers, codec)
        print(json.dumps(told))
        return
    if lacking := why_not():
        sys.exit(lacking)
    torch.set_num_threads(1)
    started, rows = time.monotonic(), list[dict[str, Any]]()
    for name, hops in product(options.model, options.hops):
        for row in measure(options, name, hops):
            rows.append(row)
            print(*(f"{key} {value}" for key, value in row.items()), file=sys.stderr, sep="  ")
    report(f"second question, {time.monotonic() - started:.0f} s in all", rows)


if __name__ == "__main__":
    main()
