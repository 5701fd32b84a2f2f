"""What the benchmarks share: models to run, a swarm of real node processes, transformers beside it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import smollm2
import torch
import transformers
import trio
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StoppingCriteria

import p2pinfer.models
from p2pinfer.client import Client, ClientConfig
from p2pinfer.client_config import AuditConfig
from p2pinfer.embedded import open_embedded_swarm
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host_config import HostConfig
from p2pinfer.session.session import Session

SHAPES: dict[str, dict[str, int]] = {
    "512x8": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 1376,
    },
    "1024x16": {
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 2816,
    },
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
}
MODELS = ("512x8", "1024x16", "smollm2")
CACHE_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}  # of each node; on one card they share its memory


@contextmanager
def model_folder(name: str) -> Iterator[Path]:
    """A checkpoint of that name: random weights of a shape, SmolLM2-135M's own, or the bundled model."""
    if name == BUNDLED_MODEL:
        yield Path(p2pinfer.models.__path__[0], BUNDLED_MODEL)
        return
    if name == "smollm2":
        yield smollm2.smollm2_folder()
        return
    config = LlamaConfig(
        **{"vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False, **SHAPES[name]}
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            LlamaForCausalLM(config).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
        tokenizer = Path(p2pinfer.models.__path__[0], BUNDLED_MODEL, "tokenizer.json")  # any will do
        shutil.copy(tokenizer, folder)
        yield Path(folder)


class Local:
    """transformers in this process: the named competitor, and the oracle.

    With `keep_margins`, `margins` holds for each token of the last `generate` how much more likely it was
    than the second likeliest.
    """

    def __init__(self, folder: Path, dtype: str, device: str = "cpu", *, keep_margins: bool = False) -> None:
        self.device = device
        self.keep_margins = keep_margins
        self.margins: list[float] = []
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._model: Any = loaded.to(device).eval()
        self._model.generation_config.eos_token_id = None  # a benchmark goes on to its last token

    def generate(self, ids: Sequence[int], new_tokens: int) -> tuple[list[int], list[float]]:
        """Greedy ids after `ids`, and the time at which each of them was known."""
        clock = _Clock()
        prompt = torch.tensor([list(ids)], device=self.device)
        output: Any = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            stopping_criteria=[clock],
            return_dict_in_generate=True,
            output_logits=self.keep_margins,
        )
        if self.keep_margins:
            best = torch.cat(output.logits).float().softmax(-1).topk(2).values
            self.margins = (best[:, 0] - best[:, 1]).tolist()
        return output.sequences[0, len(ids) :].tolist(), clock.times

    def prefill_s(self, ids: Sequence[int], chunk_tokens: int) -> float:
        """Seconds for the logits behind a prompt that is given chunk by chunk."""
        prompt = torch.tensor([list(ids)], device=self.device)
        cache: Any = None
        began = time.perf_counter()
        with torch.inference_mode():
            for chunk in prompt.split(chunk_tokens, dim=1):
                told = self._model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = told.past_key_values
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began


class _Clock(StoppingCriteria):
    """Stops nothing; notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def evenly(blocks: int, hops: int) -> list[BlockSpan]:
    """The model's blocks, divided among `hops` as evenly as they can be."""
    bounds = [round(blocks * hop / hops) for hop in range(hops + 1)]
    return [BlockSpan(start, stop) for start, stop in pairwise(bounds)]


@asynccontextmanager
async def open_swarm(
    folder: Path,
    spans: Sequence[BlockSpan],
    dtype: str,
    device: str = "cpu",
    threads: int = 1,
    weights: str = "auto",
) -> AsyncGenerator[Client]:
    """A client of one node process per span, with so many torch threads each, their weights in that format.

    A `device` of several names is for the nodes; the client has the first one. It audits nobody. Audits come
    after a session, so they would run beside whatever is timed next, local transformers included: three
    prefills of what went before. What they cost is for `liars.py` to say.
    """
    client = Client(
        model=str(folder),
        host_config=HostConfig(listen=("/ip4/127.0.0.1/tcp/0",)),
        config=ClientConfig(dtype=dtype, device=device.split(",")[0], find_timeout_s=60),
        audit=AuditConfig(rate=0.0),
    )
    cache_bytes = CACHE_BYTES[torch.device(device.split(",")[0]).type]
    compute = ComputeConfig(
        device=device, dtype=dtype, weights=weights, threads=threads, cache_bytes=cache_bytes
    )
    async with client:
        addrs = client.member.addrs
        async with open_embedded_swarm(addrs, model=str(folder), spans=spans, compute=compute):
            with trio.fail_after(60):
                while len(client.peers()) < len(spans):
                    await trio.sleep(0.05)
            yield client


class Walk:
    """One greedy generation over the swarm by token ids, with the time of each token."""

    def __init__(self, client: Client, session: Session) -> None:
        self.session = session
        self._client = client

    async def generate(self, ids: Sequence[int], new_tokens: int) -> tuple[list[int], list[float]]:
        """As `Local.generate`."""
        ends = self._client.ends
        all_ids, times = list(ids), []
        hidden = await self.session.prefill(ends.embed(ids), 0)
        while True:
            all_ids.append(int(ends.logits(hidden)[-1].argmax()))
            times.append(time.perf_counter())
            if len(times) == new_tokens:
                return all_ids[len(ids) :], times
            hidden = await self.session.decode(ends.embed(all_ids[-1:]), len(all_ids) - 1)


@asynccontextmanager
async def open_walk(client: Client, tokens: int) -> AsyncGenerator[Walk]:
    """A session on the client's best route, closed at the end."""
    session = await client.open_session(tokens, frozenset())
    try:
        yield Walk(client, session)
    finally:
        await session.aclose()


def prompt_ids(length: int, vocab_size: int = 4096) -> list[int]:
    """Some token ids, the same every time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, vocab_size, (length,), generator=generator).tolist()


def report(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table on stderr and as JSON on stdout."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(stderr=True, width=200).print(table)
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    json.dump({"title": title, "machine": machine, "rows": rows}, sys.stdout, indent=1)
    sys.stdout.write("\n")


def rounded(values: Sequence[float], digits: int = 2) -> float:
    """The median, rounded."""
    return round(median(values), digits)


def blocks_of(folder: Path) -> int:
    """How many blocks the checkpoint has."""
    blocks: int = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    return blocks
