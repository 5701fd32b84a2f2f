"""Training over three node processes against transformers and peft on one machine, step by step.

    python benchmarks/learning.py [--steps 100] [--method lora|prompt|deep|head] [--dtype float32] [--kill]
    python benchmarks/learning.py --speed [--steps 3] [--method lora deep] [--dtype float32 bfloat16]

Prints the largest relative difference of a loss, that of the final parameters, and the time of both. With
--kill there is a fourth node that holds everything, and a node is killed (SIGKILL) in the middle.

With --speed the model is one of random weights, 16 blocks of 1024, over four nodes on loopback, and only the
time of forward and backward passes of 8 texts of 128 tokens counts. Here the one machine has all cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import p2pinfer.models
from p2pinfer.blocking import BlockingClient
from p2pinfer.client import Client
from p2pinfer.client_config import ClientConfig
from p2pinfer.embedded import EmbeddedNode, open_embedded_swarm
from p2pinfer.hf import DistributedModelForCausalLM, DistributedModelForSequenceClassification
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host_config import HostConfig

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPANS = (BlockSpan(0, 3), BlockSpan(3, 5), BlockSpan(5, 8))
HEAD_CHANGES = {"num_labels": 3, "pad_token_id": 0}


def connect(
    dtype: str, spans: tuple[BlockSpan, ...], nodes: list[EmbeddedNode], model: str = BUNDLED_MODEL
) -> BlockingClient:
    """A client of nodes that compute in `dtype`, which are noted in `nodes`."""

    @asynccontextmanager
    async def open_client() -> AsyncGenerator[Client]:
        host = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
        async with Client(model=model, host_config=host, config=ClientConfig(dtype="float32")) as client:
            compute = ComputeConfig(dtype=dtype, threads=1, device="cpu")
            swarm = open_embedded_swarm(client.member.addrs, model=model, spans=spans, compute=compute)
            async with swarm as started:
                nodes.extend(started)
                await client.keep_no_record()
                yield client

    return BlockingClient(open_client)


def batch(step: int, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Padded on the left and on the right."""
    torch.manual_seed(1000 + step % 10)
    ids = torch.randint(3, 4000, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(rows):
        padding = (7 * row + step) % (length // 2)
        mask[row, : padding if row % 2 else 0] = 0
        if not row % 2 and padding:
            mask[row, length - padding :] = 0
    ids = ids.masked_fill(mask == 0, 0)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def prepare(method: str, model: Any) -> Any:
    """The model with what `method` trains."""
    torch.manual_seed(0)
    if method == "lora":
        return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=ALL_LINEAR))
    if method == "prompt":
        return peft.get_peft_model(
            model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16)
        )
    kept = "deep_prompts" if method == "deep" else "score"
    for name, each in model.named_parameters():
        each.requires_grad_(kept in name)
    return model


def with_deep_prompts(model: Any, prompts: torch.Tensor) -> Any:
    """transformers' own model with deep prompts, by hooks."""
    made = torch.nn.Parameter(prompts.detach().clone())
    model.register_parameter("deep_prompts", made)
    tokens = made.shape[1]

    def add(block: int) -> Any:
        def hook(_: object, args: Any) -> Any:
            mask = model.mask
            first = torch.where(mask.bool(), mask.cumsum(1) - 1, tokens).clamp(max=tokens)
            padded = torch.cat((made[block], torch.zeros(1, made.shape[-1])))
            return (args[0] + padded[first], *args[1:])

        return hook

    for block, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(add(block))
    return model


def train(model: Any, arguments: argparse.Namespace, nodes: list[EmbeddedNode]) -> tuple[list[float], float]:
    """Losses, and seconds."""
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(arguments.steps):
        asked = batch(step, arguments.rows, arguments.length)
        if hasattr(model, "mask"):
            model.mask = asked["attention_mask"]
        if arguments.method == "head":
            asked["labels"] = torch.arange(arguments.rows) % 3
        loss = model(**asked).loss
        if nodes and arguments.kill and step in (20, 40, 60):
            os.kill(nodes[(20, 40, 60).index(step)].process.pid, signal.SIGKILL)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, time.monotonic() - started


def write_wide(folder: Path) -> None:
    """A llama of random weights."""
    library: Any = transformers
    config = library.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=4096,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    library.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    bundled = Path(p2pinfer.models.__path__[0], BUNDLED_MODEL, "tokenizer.json")
    shutil.copy(bundled, folder)  # which the client loads, and nobody uses


def passes_s(model: Any, steps: int) -> float:
    """Seconds of a step forward and backward, the best of some after a first one."""
    ids = torch.randint(0, 1024, (8, 128), generator=torch.Generator().manual_seed(0))
    best = float("inf")
    for _ in range(steps + 1):
        started = time.monotonic()
        model(input_ids=ids, labels=ids).loss.backward()
        seconds = time.monotonic() - started
        model.zero_grad()
        best = min(best, seconds) if _ else best
    return best


def speed(arguments: argparse.Namespace) -> None:
    """Tokens a second over four nodes, and on one machine."""
    library: Any = transformers
    spans = tuple(BlockSpan(at, at + 4) for at in range(0, 16, 4))
    with tempfile.TemporaryDirectory() as folder:
        write_wide(Path(folder))
        for dtype in arguments.dtype:
            for method in arguments.method:
                with connect(dtype, spans, [], folder) as swarm:
                    prompts = 16 if method == "deep" else 0
                    torch.set_num_threads(1)
                    ours = prepare(
                        method,
                        DistributedModelForCausalLM.from_pretrained(
                            folder, swarm=swarm, dtype=dtype, deep_prompts=prompts
                        ),
                    )
                    mine = passes_s(ours, arguments.steps)
                torch.set_num_threads(os.cpu_count() or 1)
                theirs = library.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
                if method == "deep":
                    theirs.mask = torch.ones(8, 128, dtype=torch.long)
                    theirs = with_deep_prompts(theirs, torch.zeros(16, 16, 1024))
                other = passes_s(prepare(method, theirs), arguments.steps)
                print(
                    f"{method} {dtype}, 1024x16, 8x128, four nodes: {1024 / mine:.0f} tokens/s, one machine "
                    f"{1024 / other:.0f}: {other / mine:.2f} of it",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int)
    methods, dtypes = ("lora", "prompt", "deep", "head"), ("float32", "bfloat16")
    parser.add_argument("--method", choices=methods, nargs="+", default=["lora"])
    parser.add_argument("--dtype", choices=dtypes, nargs="+", default=["float32"])
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--kill", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    if arguments.speed:
        arguments.steps = arguments.steps or 3
        speed(arguments)
        return
    arguments.steps, (arguments.method, *_), (arguments.dtype, *_) = (
        arguments.steps or 100,
        arguments.method,
        arguments.dtype,
    )
    torch.set_num_threads(1)
    nodes: list[EmbeddedNode] = []
    spans = (*SPANS, BlockSpan(0, 8)) if arguments.kill else SPANS
    is_head = arguments.method == "head"
    loader = DistributedModelForSequenceClassification if is_head else DistributedModelForCausalLM
    auto: Any = transformers
    auto = auto.AutoModelForSequenceClassification if is_head else auto.AutoModelForCausalLM
    changes = HEAD_CHANGES if is_head else {}
    with connect(arguments.dtype, spans, nodes) as swarm:
        ours = loader.from_pretrained(
            swarm=swarm,
            dtype=arguments.dtype,
            deep_prompts=16 if arguments.method == "deep" else 0,
            config_changes=changes,
        )
        theirs = auto.from_pretrained(ours.name_or_path, dtype=getattr(torch, arguments.dtype), **changes)
        if is_head:
            theirs.score.load_state_dict(ours.score.state_dict())
        if arguments.method == "deep":
            theirs.mask = None
            theirs = with_deep_prompts(theirs, ours.model.layers.deep_prompts)
        ours, theirs = prepare(arguments.method, ours), prepare(arguments.method, theirs)
        mine, my_s = train(ours, arguments, nodes)
        other, other_s = train(theirs, arguments, [])
        apart = max(abs(one - two) / abs(two) for one, two in zip(mine, other, strict=True))
        ends = [
            [each.detach().float() for _, each in sorted(model.named_parameters()) if each.requires_grad]
            for model in (ours, theirs)
        ]
        by = [torch.cat([each.flatten() for each in end]) for end in ends]
        moved = float((by[0] - by[1]).norm() / by[1].norm())
        tokens = sum(
            int(batch(step, arguments.rows, arguments.length)["attention_mask"].sum())
            for step in range(arguments.steps)
        )
        print(
            f"{arguments.method} {arguments.dtype}, {arguments.steps} steps"
            f"{', three nodes killed' if arguments.kill else ''}: loss {other[0]:.4f} -> {other[-1]:.4f}; "
            f"losses differ by {apart:.2e}, parameters by {moved:.2e} (relative); "
            f"{tokens / my_s:.0f} tokens/s, on one machine {tokens / other_s:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
