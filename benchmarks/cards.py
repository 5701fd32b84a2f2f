"""A model too large for one card, over all cards of a machine: one node that spans them, and a node on each.

    python benchmarks/cards.py --out cards.json               # Llama-3.1-70B's shape, all parts, all cards
    python benchmarks/cards.py --part bandwidth steps --out cards.json
    python benchmarks/cards.py --part ids --out cards.json    # 1024x16, float32: ids of transformers
    python benchmarks/cards.py --model tiny --device cpu cpu --context 40 --rounds 3    # tried anywhere

Weights are random, bfloat16, and made on the cards (random_model.py). Parts: `bandwidth` reads each card's
memory. `local` is transformers, its layers on the cards in turn, as accelerate's device_map puts them. `one`
is one node over all cards, `each` one node a card, in a chain over loopback; the client is this process.
`steps` runs the first without a network. `of floor` is the time in which the first card's memory could be
read at the measured rate as often as all weights of the blocks need it, over the time that a token took.
Every row goes to `--out` as a line of JSON when it is known, so a part that fails loses no other.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import decode
import random_model
import torch
import trio
from contest import Local, blocks_of, evenly, model_folder, open_swarm, open_walk, prompt_ids
from torch import Tensor
from torch.nn import functional

from p2pinfer.client import Client, ClientConfig
from p2pinfer.client_config import AuditConfig, SessionConfig
from p2pinfer.models.compute.architecture import describe_architecture
from p2pinfer.models.compute.paged_decode import attend_in_parts
from p2pinfer.models.compute.runner import Chunk, SpanRunner, open_runner
from p2pinfer.models.compute.target import DTYPES
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host_config import HostConfig

PARTS = ("bandwidth", "ids", "attention", "steps", "local", "one", "each")
START_S = 150.0  # for a node: its weights are made, its steps recorded


class Bench:
    """The settings of a run, and where its rows go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.name: str = options.model
        self.devices: list[str] = options.device
        self.contexts: list[int] = options.context
        self.sessions: list[int] = options.sessions
        self.rounds: int = options.rounds
        self.prompt: int = options.prompt
        self.chunks: list[int] = options.chunk
        self.dtype: str = options.dtype
        self._out: Path | None = options.out
        self.checkpoint = random_model.RandomCheckpoint(self.name)
        spec = self.checkpoint.spec
        self.spec = spec
        self.weights_bytes = spec.num_blocks * spec.block_bytes()
        self.token_bytes = spec.num_blocks * spec.kv_bytes_per_token_per_block()
        self.tokens = max(self.sessions) * (max(self.contexts) + self.rounds + 192)
        self.tokens = max(self.tokens, 6 * self.prompt) * 5 // 4
        self.floor_ms = 0.0

    def tell(self, part: str, **row: Any) -> None:
        """Write a row at once."""
        row = {"part": part, "model": self.name, **row}
        print(json.dumps(row), flush=True)
        if self._out is not None:
            with self._out.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def of_floor(self, ms: float) -> float | None:
        """Share of a token's time in which memory could have been read once."""
        if not self.floor_ms and self.devices[0].startswith("cuda"):
            self.floor_ms = self.weights_bytes / bandwidth(self.devices[0]) * 1e3
        return round(self.floor_ms / ms, 3) if self.floor_ms else None


def wait_for(devices: Sequence[str]) -> None:
    for device in devices:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)


def bandwidth(device: str, size: int = 2 << 30) -> float:
    """Bytes a second that a card reads: the least time of some sums over 2 GiB."""
    values = torch.zeros(size // 4, device=device)
    seconds: list[float] = []
    for _ in range(20):
        wait_for([device])
        started = time.perf_counter()
        values.sum()
        wait_for([device])
        seconds.append(time.perf_counter() - started)
    return size / median(seconds[5:])


def between(one: str, other: str, size: int) -> float:
    """Seconds in which a tensor goes from one device to another, a hundred in a row."""
    values = torch.zeros(size // 2, dtype=torch.bfloat16, device=one)
    into = torch.empty_like(values, device=other)
    for _ in range(10):
        into.copy_(values)
    wait_for([one, other])
    started = time.perf_counter()
    for _ in range(100):
        into.copy_(values)
    wait_for([one, other])
    return (time.perf_counter() - started) / 100


def run_bandwidth(bench: Bench) -> None:
    rates = {device: round(bandwidth(device) / 1e9) for device in bench.devices}
    row = 2 * bench.spec.hidden_size
    bench.tell("bandwidth", gb_per_s=rates, weights_gb=round(bench.weights_bytes / 1e9, 2))
    for one, other in pairwise(bench.devices):
        seconds = {f"{size} bytes": between(one, other, size) for size in (row, 16 * row, 256 * row)}
        bench.tell(
            "hand-over", between=f"{one} {other}", us={k: round(v * 1e6, 1) for k, v in seconds.items()}
        )


# ---------------------------------------------------------------------- without a network


def run_steps(bench: Bench) -> None:
    """Steps and prompts through a runner of all blocks over all cards."""
    config = ComputeConfig(
        device=",".join(bench.devices), dtype=bench.dtype, cache_bytes=bench.tokens * bench.token_bytes
    )
    started = time.perf_counter()
    runner = open_runner(bench.checkpoint, BlockSpan(0, bench.spec.num_blocks), config)
    wait_for(bench.devices)
    bench.tell("steps", where=runner.where, loading_s=round(time.perf_counter() - started, 1))
    for context in bench.contexts:
        for count in bench.sessions:
            time_decoding(bench, runner, context, count)
    for chunk in bench.chunks:
        time_prompt(bench, runner, chunk)
    del runner
    forget()


def rows_of(bench: Bench, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, bench.spec.hidden_size, generator=generator).bfloat16()


def time_decoding(bench: Bench, runner: SpanRunner, context: int, count: int) -> None:
    leases = [runner.cache.reserve(context + bench.rounds + 1) for _ in range(count)]
    hidden = rows_of(bench, 1)
    for lease in leases:
        lease.length = context  # what is cached makes no difference to the time
    seconds: list[float] = []
    for _ in range(bench.rounds):
        chunks = [Chunk(lease, lease.length, hidden) for lease in leases]
        started = time.perf_counter()
        runner.run(chunks)
        seconds.append(time.perf_counter() - started)
    for lease in leases:
        lease.release()
    ms = median(seconds[2:]) * 1e3
    found = {"ms": round(ms, 2), "first_ms": round(seconds[0] * 1e3, 1), "of_floor": bench.of_floor(ms)}
    bench.tell("steps", context=context, sessions=count, **found)


def time_prompt(bench: Bench, runner: SpanRunner, chunk: int) -> None:
    hidden = rows_of(bench, bench.prompt)
    seconds: list[float] = []
    for _ in range(4):
        lease = runner.cache.reserve(bench.prompt)
        started = time.perf_counter()
        for at in range(0, bench.prompt, chunk):
            runner.run([Chunk(lease, at, hidden[at : at + chunk])])
        seconds.append(time.perf_counter() - started)
        lease.release()
    bench.tell("steps", prompt=bench.prompt, chunk=chunk, s=round(median(seconds[1:]), 4))


def run_attention(bench: Bench) -> None:
    """One block's attention over gathered keys, whole and in parts, as a step has it."""
    shape, device = describe_architecture(bench.checkpoint.config), torch.device(bench.devices[0])
    dtype = DTYPES[bench.dtype]
    for batch, context in ((1, 512), (1, 1024), (1, 4096), (4, 4096), (16, 1024), (16, 4096)):
        keys = torch.randn(2, shape.kv_heads, batch * context, shape.head_dim, device=device, dtype=dtype)
        split = keys.view(2, shape.kv_heads, batch, context, shape.head_dim).transpose(1, 2)
        group = shape.heads // shape.kv_heads
        rows = torch.randn(batch, shape.kv_heads, group, shape.head_dim, device=device, dtype=dtype)
        mask = torch.zeros(batch, 1, 1, context, device=device, dtype=dtype).expand(-1, -1, group, -1)
        slots = torch.arange(batch * context, device=device)
        whole = partial(
            functional.scaled_dot_product_attention, rows, split[0], split[1], attn_mask=mask, scale=0.1
        )
        found = {
            "gather": timed(device, lambda keys=keys, slots=slots: keys.flatten(0, 1).index_select(1, slots)),
            "whole": timed(device, whole),
        }
        for parts in (2, 4, 8, 16, 32):
            if context // parts >= 128:
                work = partial(attend_in_parts, rows, split[0], split[1], mask, 0.1, parts)
                found[f"{parts} parts"] = timed(device, work)
                difference = (work().float() - whole().float()).abs().max()
                found[f"{parts} parts differ"] = float(difference)
        bench.tell("attention", batch=batch, context=context, us=found)


def timed(device: torch.device, work: Callable[[], Tensor], times: int = 20) -> float:
    """Microseconds on the device, `times` in one recording, as launches cost nothing in a step."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return round((time.perf_counter() - started) * 1e6, 1)
    work()
    graph: Any = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(times):
            work()
    graph.replay()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        graph.replay()
    torch.cuda.synchronize()
    return round((time.perf_counter() - started) / 10 / times * 1e6, 1)


# ---------------------------------------------------------------------- transformers


def run_local(bench: Bench) -> None:
    """transformers on all cards: a prompt, and single tokens behind it."""
    model = local_model(bench)
    ids = torch.tensor([prompt_ids(bench.prompt, bench.spec.vocab_size)], device=bench.devices[0])
    with torch.inference_mode():
        seconds: list[float] = []
        for _ in range(6):
            wait_for(bench.devices)
            started = time.perf_counter()
            int(model(ids, logits_to_keep=1, use_cache=True).logits.argmax())
            seconds.append(time.perf_counter() - started)
        bench.tell("local", prompt=bench.prompt, s=round(median(seconds[2:]), 4), all_s=seconds)
        for context in bench.contexts:
            prompt = torch.tensor([prompt_ids(context, bench.spec.vocab_size)], device=bench.devices[0])
            output = model(prompt, logits_to_keep=1, use_cache=True)
            times, new = [time.perf_counter()], []
            for _ in range(min(bench.rounds, 12)):
                new.append(int(output.logits[0, -1].argmax()))
                times.append(time.perf_counter())
                last = torch.tensor([new[-1:]], device=bench.devices[0])
                output = model(last, past_key_values=output.past_key_values, use_cache=True)
            ms = median(after - before for before, after in pairwise(times[2:])) * 1e3
            bench.tell("local", context=context, sessions=1, ms=round(ms, 2), ids=new[:8])
    del model, output
    forget()


def local_model(bench: Bench) -> Any:
    """transformers' model with the same weights, its layers spread over the devices in turn."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{k: v for k, v in random_model.config_of(bench.name).items() if k != "model_type"})
    dtype = torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    first, last = torch.device(bench.devices[0]), torch.device(bench.devices[-1])
    places = {"model.embed_tokens.weight": first, "model.norm.weight": last, "lm_head.weight": last}
    for device, span in zip(bench.devices, evenly(bench.spec.num_blocks, len(bench.devices)), strict=True):
        for block in range(span.start, span.stop):
            places |= {name: torch.device(device) for name in bench.checkpoint.block_names(block)}
            move_before(model.model.layers[block], torch.device(device))
    for module, device in ((model.model.norm, last), (model.lm_head, last)):
        move_before(module, device)
    for name, shape in random_model.shapes_of(random_model.config_of(bench.name)).items():
        owner = model.get_submodule(name.rpartition(".")[0])
        drawn = random_model.draw(name, shape, places[name])
        owner.weight = torch.nn.Parameter(drawn, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(first)
    return model.eval()


def move_before(module: Any, device: torch.device) -> None:
    """Have what goes into a module moved to its device, as accelerate's hooks do."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(map(moved, value)) if isinstance(value, tuple) else value

    def hook(_: Any, args: Any, kwargs: Any) -> Any:
        return moved(args), {name: moved(value) for name, value in kwargs.items()}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------- nodes


@asynccontextmanager
async def open_nodes(bench: Bench, layout: Sequence[tuple[BlockSpan, str]]) -> AsyncGenerator[Client]:
    """A client of node processes, each with blocks on devices of its own."""
    client = Client(
        model=random_model.PREFIX + bench.name,
        host_config=HostConfig(listen=("/ip4/127.0.0.1/tcp/0",)),
        config=ClientConfig(dtype=bench.dtype, device=bench.devices[0], find_timeout_s=60, speculate="off"),
        audit=AuditConfig(rate=0.0),
    )
    async with AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        await stack.enter_async_context(client)
        nursery = await stack.enter_async_context(trio.open_nursery())
        processes = [
            await start_node(bench, home / str(index), span, device, client.member.addrs)
            for index, (span, device) in enumerate(layout)
        ]
        try:
            with trio.fail_after(START_S):
                for index, process in enumerate(processes):
                    await nursery.start(listen, process, home / str(index) / "stderr")
                while len(client.peers()) < len(layout):
                    await trio.sleep(0.05)
            yield client
        finally:
            with trio.CancelScope(shield=True):
                for process in processes:
                    process.terminate()
                with trio.move_on_after(20):
                    for process in processes:
                        await process.wait()
                for process in processes:
                    if process.returncode is None:
                        process.kill()
                        await process.wait()
            nursery.cancel_scope.cancel()


async def start_node(
    bench: Bench, home: Path, span: BlockSpan, device: str, bootstrap: Sequence[str]
) -> trio.Process:
    home.mkdir()
    cache_bytes = bench.tokens * bench.token_bytes * len(span) // bench.spec.num_blocks
    (home / "config.toml").write_text(
        f'[compute]\ndevice = "{device}"\ndtype = "{bench.dtype}"\nthreads = 1\ncache_bytes = {cache_bytes}\n'
        f"[serve]\nclient_share = 1.0\nreplay_bytes = {8 << 30}\nannounce_min_gap_s = 0.2\n"
    )
    command = [sys.executable, str(Path(__file__).with_name("random_model.py")), "node", "--json"]
    command += ["--until-stdin-closes", "--model", random_model.PREFIX + bench.name, "--blocks", str(span)]
    command += ["--data-dir", str(home), "--listen", "/ip4/127.0.0.1/tcp/0"]
    command += [word for address in bootstrap for word in ("--bootstrap", address)]
    with (home / "stderr").open("wb") as stderr:
        return await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, cwd=home
        )


async def listen(
    process: trio.Process,
    stderr: Path,
    *,
    task_status: trio.TaskStatus[dict[str, Any]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Read what a node prints; started once it serves."""
    assert process.stdout is not None
    rest, ready = b"", False
    async for received in process.stdout:
        *lines, rest = (rest + received).split(b"\n")
        for event in map(json.loads, lines):
            if event["event"] == "ready" and not ready:
                ready = True
                print(event, file=sys.stderr)
                task_status.started(event)
    if not ready:
        raise RuntimeError(f"a node ended before it served: {stderr.read_text()[-3000:]}")


async def run_nodes(bench: Bench, part: str) -> None:
    """Tokens and prompts over one node on all cards, or over one node a card."""
    whole = [(BlockSpan(0, bench.spec.num_blocks), ",".join(bench.devices))]
    spans = evenly(bench.spec.num_blocks, len(bench.devices))
    layout = whole if part == "one" else list(zip(spans, bench.devices, strict=True))
    started = time.perf_counter()
    async with open_nodes(bench, layout) as client:
        bench.tell(part, layout=[f"{span} on {device}" for span, device in layout])
        bench.tell(part, ready_s=round(time.perf_counter() - started, 1))
        addrs = [peer.announcement.addrs[0] for peer in client.peers()]
        for chunk in bench.chunks:  # first: what is announced of the cache lags behind
            await prefill(bench, part, addrs, chunk)
        for context in bench.contexts:
            for count in bench.sessions:
                await decode_together(bench, part, client, context, count)


async def decode_together(bench: Bench, part: str, client: Client, context: int, count: int) -> None:
    """Sessions of one client that go on together, each token for all of them in one product of the head."""
    ends, ids = client.ends, prompt_ids(context, bench.spec.vocab_size)
    embedded, new, times = ends.embed(ids), list[int](), list[float]()
    async with AsyncExitStack() as stack:
        walks = [
            await stack.enter_async_context(open_walk(client, context + bench.rounds + 1))
            for _ in range(count)
        ]
        hidden: list[Tensor] = [torch.empty(0)] * count
        started = time.perf_counter()

        async def run(index: int, work: Callable[[], Any]) -> None:
            hidden[index] = await work()

        async with trio.open_nursery() as nursery:
            for index, walk in enumerate(walks):
                nursery.start_soon(run, index, lambda walk=walk: walk.session.prefill(embedded, 0))
        prompts_s = time.perf_counter() - started
        for position in range(context, context + bench.rounds):
            picked = ends.logits(torch.cat([each[-1:] for each in hidden])).argmax(-1).tolist()
            times.append(time.perf_counter())
            new.append(picked[0])
            rows = ends.embed(picked)
            async with trio.open_nursery() as nursery:
                for index, walk in enumerate(walks):
                    nursery.start_soon(
                        run,
                        index,
                        lambda walk=walk, row=rows[index : index + 1], at=position: walk.session.decode(
                            row, at
                        ),
                    )
        ms = median(after - before for before, after in pairwise(times[2:])) * 1e3
        bill = decode.bill_of(walks[0], times[2:])
    bench.tell(
        part,
        context=context,
        sessions=count,
        ms=round(ms, 2),
        tokens_per_s=round(count / ms * 1e3, 1),
        of_floor=bench.of_floor(ms),
        bill={name: round(value, 2) for name, value in bill.items()},
        prompts_s=round(prompts_s, 2),
        ids=new[:8],
    )


async def prefill(bench: Bench, part: str, addrs: Sequence[str], chunk: int) -> None:
    """Time from a prompt to its first token, the session's opening included."""
    client = Client(
        model=random_model.PREFIX + bench.name,
        bootstrap=addrs,
        config=ClientConfig(dtype=bench.dtype, device=bench.devices[0], find_timeout_s=60, speculate="off"),
        audit=AuditConfig(rate=0.0),
        session_config=SessionConfig(chunk_tokens=chunk),
    )
    ids = prompt_ids(bench.prompt, bench.spec.vocab_size)
    seconds: list[float] = []
    async with client:
        with trio.fail_after(60):
            while len(client.peers()) < len(addrs):
                await trio.sleep(0.05)
        for _ in range(5):
            started = time.perf_counter()
            async with open_walk(client, bench.prompt + 1) as walk:
                _, times = await walk.generate(ids, 1)
                seconds.append(times[0] - started)
    found = {"s": round(median(seconds[2:]), 4), "all_s": [round(each, 4) for each in seconds]}
    bench.tell(part, prompt=bench.prompt, chunk=chunk, **found)


async def run_ids(bench: Bench) -> None:
    """Ids of a node over all cards against transformers' on the first one."""
    with model_folder("1024x16") as folder:
        local = Local(folder, "float32", bench.devices[0])
        spans = evenly(blocks_of(folder), 1)
        async with open_swarm(folder, spans, "float32", ",".join(bench.devices)) as client:
            row = await decode.contest(client, local, 3, 1)
        bench.tell("ids", **{**row, "model": "1024x16"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cards = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", default="70b")
    parser.add_argument("--device", nargs="+", default=cards or ["cpu", "cpu"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", nargs="+", type=int, default=[512, 4000])
    parser.add_argument("--sessions", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=2047)
    parser.add_argument(
        "--chunk", nargs="+", type=int, default=[256, 1024], help="tokens of a prompt's chunks"
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    random_model.install()
    bench = Bench(options)
    failed = False
    runs: dict[str, Callable[[], Any]] = {
        "bandwidth": lambda: run_bandwidth(bench),
        "ids": lambda: trio.run(run_ids, bench),
        "attention": lambda: run_attention(bench),
        "steps": lambda: run_steps(bench),
        "local": lambda: run_local(bench),
        "one": lambda: trio.run(run_nodes, bench, "one"),
        "each": lambda: trio.run(run_nodes, bench, "each"),
    }
    for part in options.part:
        try:
            runs[part]()
        except Exception as exc:
            failed = True
            traceback.print_exc()
            bench.tell(part, failed=f"{type(exc).__name__}: {exc}"[-2000:])
            forget()
    sys.exit(failed)


if __name__ == "__main__":
    main()
