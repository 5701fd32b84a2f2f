"""Parts of a training run that the bundled models share: optimizer, schedule, order of the rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Final

import torch
from torch import Tensor

WEIGHT_DECAY: Final = 0.1


def schedule(part: float) -> float:
    """The share of the highest learning rate: linear warm-up, then a cosine over the time allowed."""
    return min(1, 40 * part + 1e-3) * (0.01 + 0.99 * (1 + math.cos(math.pi * part)) / 2)


def new_optimizer(parameters: Iterable[Tensor], lr: float, device: str) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves norms alone."""
    every = list(parameters)
    groups = [
        {"params": [each for each in every if (each.dim() > 1) == wide], "weight_decay": WEIGHT_DECAY * wide}
        for wide in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=device == "cuda")


def endless_batches(rows: Tensor, batch: int) -> Iterator[tuple[int, Tensor]]:
    """(epoch, batch) without end; every epoch in another order, its last, smaller batch left out."""
    epoch = 0
    while True:
        epoch += 1
        order = torch.randperm(len(rows), device=rows.device).split(batch)
        whole = [each for each in order if len(each) == batch]
        if not whole:
            raise SystemExit(f"{len(rows)} rows make no batch of {batch}: generate more")
        for each in whole:
            yield epoch, rows[each]
