"""The student's training: AdamW for a given time, with a learning rate that follows the clock."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from ..training_steps import endless_batches, new_optimizer, schedule
from .settings import BOS, EOS, PAD, STUDENT, Settings

_LOOK_EVERY, _REPORT_EVERY, _SAVE_EVERY = 20, 500, 5000  # steps


def train(settings: Settings) -> None:
    """Train on --work/rows_NN.npy and write the student to --out."""
    AttentionInterface.register("causal", causal_attention)
    torch.manual_seed(settings.seed)
    rows = load_rows(settings)
    held, rows = rows[: settings.batch], rows[settings.batch :]
    model = new_student(settings)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters; {rows.numel() / 1e6:.0f}M packed tokens", flush=True)
    optimizer = new_optimizer(model.parameters(), settings.lr, settings.device)
    loss_of = compiled_loss(model, settings.device)
    loss_of(held.long()).backward()  # compiles before the clock starts
    optimizer.zero_grad()
    start, step = time.time(), 0
    batches = endless_batches(rows, settings.batch)
    million = settings.batch * settings.length / 1e6
    epoch = 0
    while (part := (time.time() - start) / settings.train_seconds) < 1:
        epoch, batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * schedule(part)
        loss = loss_of(batch.long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % _LOOK_EVERY == 0:
            loss.item()  # keeps the host from running ahead of the clock
        if step % _REPORT_EVERY == 0:
            print(
                f"step {step} epoch {epoch} {step * million:.0f}M tokens {time.time() - start:.0f} s "
                f"loss {loss.item():.3f} held {loss_of(held.long()).item():.3f}",
                flush=True,
            )
        if step % _SAVE_EVERY == 0:
            save_student(model, settings)
    save_student(model, settings)
    last = loss_of(held.long()).item()
    print(f"{step} steps, {step * million:.0f}M tokens, epoch {epoch}, held {last:.3f}", flush=True)


def causal_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Plain causal attention: without transformers' mask, torch.compile can use the flash kernel."""
    attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return attended.transpose(1, 2), None


def load_rows(settings: Settings) -> Tensor:
    """All packed rows (rows, length) as int16."""
    files = sorted(Path(settings.work).glob("rows_*.npy"))
    return torch.from_numpy(np.concatenate([np.load(file) for file in files])).to(settings.device)


def new_student(settings: Settings) -> Any:
    """A student with small residual branches, as in GPT-2, or the one to go on from."""
    config: Any = cast("Any", LlamaConfig)(**STUDENT, attn_implementation="causal")
    model: Any = cast("Any", LlamaForCausalLM(config)).to(settings.device)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.div_(math.sqrt(2 * STUDENT["num_hidden_layers"]))
    if settings.init:
        given: Any = LlamaForCausalLM.from_pretrained(settings.init, dtype=torch.float32)
        model.load_state_dict(given.state_dict())
    return model


def compiled_loss(model: Any, device: str) -> Callable[[Tensor], Any]:
    """Next-token loss of a batch (rows, length), in bfloat16 where that is safe."""

    @torch.compile(disable=device != "cuda")
    def loss_of(ids: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
            return loss

    return loss_of


def save_student(model: Any, settings: Settings) -> None:
    """Write the student as a model folder in bfloat16; several shards, so that loaders meet an index."""
    half: Any = LlamaForCausalLM(LlamaConfig(**STUDENT))
    half.to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(settings.out, max_shard_size="8MB")
    Tokenizer.from_file(str(settings.in_work("tokenizer.json"))).save(f"{settings.out}/tokenizer.json")
    files: dict[str, dict[str, Any]] = {
        "config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **STUDENT,
            "hidden_act": "silu",
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        },
        "generation_config": {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS},
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": 1024,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in files.items():
        (Path(settings.out) / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
