"""The drafter's training: towards the target's distribution at every position of its texts.

Coupled draws of two distributions differ at most with twice their total variation (Daliri et al., 2024), so
that is part of the loss. It has small gradients where the two are far apart, and there the other part leads,
the Kullback-Leibler divergence from the target (Hinton, Vinyals and Dean, 2015).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..training_steps import endless_batches, new_optimizer, schedule
from .llama import Llama
from .settings import Settings

_LOOK_EVERY, _REPORT_EVERY = 20, 250  # steps


def distil(target: Llama, drafter: Llama, rows: Tensor, settings: Settings) -> None:
    """Train `drafter`, in float32, on `rows` (rows, length) for the time that is given."""
    optimizer = new_optimizer(drafter.parameters(), settings.lr, settings.device)
    loss_of = compiled_loss(target, drafter, settings)
    loss_of(rows[: settings.batch].long()).backward()  # compiles before the clock starts
    optimizer.zero_grad()
    start, step, epoch = time.time(), 0, 0
    batches = endless_batches(rows, settings.batch)
    while (part := (time.time() - start) / settings.train_seconds) < 1:
        epoch, batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * schedule(part)
        loss = loss_of(batch.long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % _LOOK_EVERY == 0:
            loss.item()  # keeps the host from running ahead of the clock
        if step % _REPORT_EVERY == 0:
            print(f"step {step} epoch {epoch} {time.time() - start:.0f} s loss {loss.item():.4f}", flush=True)
    print(f"{step} steps of {settings.batch} rows, epoch {epoch}", flush=True)


def compiled_loss(target: Llama, drafter: Llama, settings: Settings) -> Callable[[Tensor], Tensor]:
    """Divergence plus total variation, in nats a position, of a batch (rows, length)."""

    @torch.compile(disable=settings.device != "cuda")
    def loss_of(ids: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = target(ids).float().log_softmax(-1)
        with torch.autocast(settings.device, torch.bfloat16, enabled=settings.device == "cuda"):
            logits = drafter(ids)
        given = logits.float().log_softmax(-1)
        chance = wanted.exp()
        divergence = (chance * (wanted - given)).sum(-1)
        variation = (chance - given.exp()).abs().sum(-1) / 2
        return (divergence + variation).mean()

    return loss_of
