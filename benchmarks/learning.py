"""Training over three node processes against transformers and peft on one machine, step by step.

    python benchmarks/learning.py [--steps 100] [--method lora prompt deep head prefix encoder]
    python benchmarks/learning.py --model six --method all --dtype float32 bfloat16    # the whole table
    python benchmarks/learning.py --model all --steps 20        # every family, random weights, four blocks
    python benchmarks/learning.py --kill                        # each node in turn, by SIGKILL

Prints the largest relative difference of a loss, that of the final parameters, and the time of both. Batches
are padded, on the left and on the right, and spans are uneven. With --kill there is a fourth node that holds
everything. Of a family that cannot be trained over a swarm it prints why. --out keeps all losses. At the end
comes a table: of each method and family the losses and the parameters apart, or why there are none.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for samples of the families, which belong to the tests

import peft
import torch
import transformers
from contest import blocks_of

import p2pinfer.models
from p2pinfer.client import Client
from p2pinfer.client_config import AuditConfig, ClientConfig
from p2pinfer.embedded import EmbeddedNode, embedded_spans, open_embedded_swarm
from p2pinfer.errors import LocalError
from p2pinfer.hf import DistributedModelForCausalLM, DistributedModelForSequenceClassification
from p2pinfer.loops.blocking import BlockingClient
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.learning.adapter import PROJECTIONS
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host_config import HostConfig
from tests.models.families.parity import write_model
from tests.models.families.samples import SAMPLES

METHODS = ("lora", "prompt", "deep", "head", "prefix", "encoder")
SIX = ("gemma2", "llama", "mistral", "mixtral", "qwen2", "qwen3")
DTYPES = ("float32", "bfloat16")
PROMPT_TOKENS = 16
CACHE_BYTES = 1 << 28
PREFIX_TOKENS = 8  # fewer than the windows of the families' samples
KILLED_AT = (20, 40, 60)  # steps, between forward and backward
HEAD_CHANGES = {"num_labels": 3, "pad_token_id": 0}


def connect(
    dtype: str,
    spans: tuple[BlockSpan, ...],
    nodes: list[EmbeddedNode],
    model: str = BUNDLED_MODEL,
    device: str = "cpu",
    threads: int = 1,
) -> BlockingClient:
    """A client of nodes that compute in `dtype`, which are noted in `nodes`. It audits nobody."""

    @asynccontextmanager
    async def open_client() -> AsyncGenerator[Client]:
        host = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
        config, audit = ClientConfig(dtype="float32"), AuditConfig(rate=0.0)
        async with Client(model=model, host_config=host, config=config, audit=audit) as client:
            # Training needs no cache, and nodes that share a card would each take what is free for one.
            compute = ComputeConfig(dtype=dtype, threads=threads, device=device, cache_bytes=CACHE_BYTES)
            swarm = open_embedded_swarm(client.member.addrs, model=model, spans=spans, compute=compute)
            async with swarm as started:
                nodes.extend(started)
                await client.keep_no_record()
                yield client

    return BlockingClient(open_client)


def batch(step: int, vocabulary: int, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Padded on the left and on the right."""
    rows, length = options.rows, options.length
    torch.manual_seed(1000 + step % 10)
    ids = torch.randint(3, vocabulary, (rows, length))
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


def projections_of(model: Any) -> list[str]:
    """Products of a model's blocks that take LoRA over a swarm."""
    layers = getattr(model.model, "layers", None)
    names = PROJECTIONS if layers is None else [name for name, _ in layers[0].named_modules()]
    found = [each for each in PROJECTIONS if each in names]
    fused = {"self_attn.qkv_proj", "mlp.gate_up_proj"} & {*names}
    return [each for each in found if not (fused and each == "mlp.down_proj")]


def prepare(method: str, model: Any) -> Any:
    """The model with what `method` trains."""
    torch.manual_seed(0)
    if method == "lora":
        products = [each.rpartition(".")[2] for each in projections_of(model)]
        return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=products))
    if method == "prompt":
        return peft.get_peft_model(
            model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT_TOKENS)
        )
    if method == "prefix":
        return peft.get_peft_model(
            model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX_TOKENS)
        )
    if method == "encoder":
        return peft.get_peft_model(
            model,
            peft.PromptEncoderConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=PROMPT_TOKENS, encoder_hidden_size=16
            ),
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
            return ((args[0] + padded[first]).to(args[0].dtype), *args[1:])

        return hook

    for block, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(add(block))
    return model


def train(
    model: Any, method: str, options: argparse.Namespace, nodes: list[EmbeddedNode]
) -> tuple[list[float], float]:
    """Losses, and seconds."""
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(options.steps):
        asked = batch(step, model.config.vocab_size, options)
        if hasattr(model, "mask"):
            model.mask = asked["attention_mask"]
        if method == "head":
            asked["labels"] = torch.arange(options.rows) % 3
        loss = model(**asked).loss
        if nodes and options.kill and step in KILLED_AT:
            os.kill(nodes[KILLED_AT.index(step)].process.pid, signal.SIGKILL)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, time.monotonic() - started


def family_folder(name: str, folder: Path) -> Path:
    """A model of random weights of a family, as the tests of families have it."""
    write_model(folder, name, SAMPLES[name].config, prompts=0)
    # The client loads a tokenizer, which nobody uses.
    shutil.copy(Path(p2pinfer.models.__path__[0], BUNDLED_MODEL, "tokenizer.json"), folder)
    return folder


def compare(
    folder: Path,
    method: str,
    dtype: str,
    options: argparse.Namespace,
    swarm: BlockingClient,
    nodes: list[EmbeddedNode],
) -> dict[str, Any]:
    """Figures of one row: both are trained."""
    is_head = method == "head"
    loader = DistributedModelForSequenceClassification if is_head else DistributedModelForCausalLM
    library: Any = transformers
    auto = library.AutoModelForSequenceClassification if is_head else library.AutoModelForCausalLM
    changes = HEAD_CHANGES if is_head else {}
    torch.manual_seed(0)
    prompts = PROMPT_TOKENS if method == "deep" else 0
    ours = loader.from_pretrained(
        folder, swarm=swarm, dtype=dtype, deep_prompts=prompts, config_changes=changes
    )
    # SDPA has no soft caps, and some versions of transformers use it for Gemma 2 all the same.
    theirs = auto.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", **changes
    ).eval()
    passes = ours.model.layers.passes.trainer
    if is_head:
        theirs.score.load_state_dict(ours.score.state_dict())
    if method == "deep":
        theirs.mask = None
        theirs = with_deep_prompts(theirs, ours.model.layers.deep_prompts)
    ours, theirs = prepare(method, ours), prepare(method, theirs)
    mine, my_s = train(ours, method, options, nodes)
    passes.close()  # so that hops let the next model in
    other, other_s = train(theirs, method, options, [])
    ends = [
        torch.cat([each.detach().float().flatten() for each in trained_of(model)]) for model in (ours, theirs)
    ]
    tokens = sum(int(batch(step, 90, options)["attention_mask"].sum()) for step in range(options.steps))
    return {
        "steps": options.steps,
        "first loss": other[0],
        "last loss": other[-1],
        "losses apart": max(abs(one - two) / abs(two) for one, two in zip(mine, other, strict=True)),
        "parameters apart": float((ends[0] - ends[1]).norm() / ends[1].norm()),
        "tokens/s": round(tokens / my_s),
        "one machine": round(tokens / other_s),
        "losses": [mine, other],
    }


def trained_of(model: Any) -> list[torch.Tensor]:
    """Trained parameters, in the order of their names."""
    return [each for _, each in sorted(model.named_parameters()) if each.requires_grad]


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of all that is asked for."""
    named: dict[str, list[str]] = {"all": sorted(SAMPLES), "six": [*SIX]}
    asked: list[str] = options.model
    names = named.get(asked[0], asked)
    methods = METHODS if options.method == ["all"] else options.method
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            if name == BUNDLED_MODEL:
                folder = Path(p2pinfer.models.__path__[0], BUNDLED_MODEL)
            else:
                folder = family_folder(name, Path(scratch))
            spans = embedded_spans(blocks_of(folder))
            if options.kill:
                spans.append(BlockSpan(0, blocks_of(folder)))
            for dtype in options.dtype:
                nodes: list[EmbeddedNode] = []
                with connect(dtype, tuple(spans), nodes, str(folder)) as swarm:
                    for method in methods:
                        row = {"model": name, "method": method, "dtype": dtype}
                        try:
                            yield row | compare(folder, method, dtype, options, swarm, nodes)
                        except (LocalError, ValueError) as exc:
                            yield row | {"refused": str(exc)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[BUNDLED_MODEL], help="families, or: all, six")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--method", choices=(*METHODS, "all"), nargs="+", default=["lora"])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--out", type=Path, help="a JSON file for all losses")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for row in measure(options):
        rows.append(row)
        said = {name: each for name, each in row.items() if name != "losses"}
        print(json.dumps(said), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(rows))
    print(table_of(rows))


def table_of(rows: list[dict[str, Any]]) -> str:
    """Markdown: losses and parameters apart, by method and dtype down, by model across."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [f"| {' | '.join(('method, dtype', *models))} |", "| --- " * (1 + len(models)) + "|"]
    for method, dtype in dict.fromkeys((row["method"], row["dtype"]) for row in rows):
        cells = {row["model"]: row for row in rows if (row["method"], row["dtype"]) == (method, dtype)}
        found = [_cell(cells[name]) if name in cells else "" for name in models]
        lines.append(f"| {' | '.join((f'{method}, {dtype}', *found))} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if "refused" in row:
        return "refused"
    return f"{row['losses apart']:.1e}, {row['parameters apart']:.1e}"


if __name__ == "__main__":
    main()
