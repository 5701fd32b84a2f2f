"""Texts to learn from: rows that the target writes itself, story after story."""

from __future__ import annotations

import random
import time

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.tiny_stories.openings import random_opening

from .llama import Llama
from .settings import BOS, EOS, Settings

# Greedy rows are few, as they repeat each other; all others are drawn from what the target really says.
TEMPERATURES = (0.0, 0.5, 0.7, 0.7, 0.8, 1.0, 1.0, 1.0)
_OPENED = 0.5  # share of rows that begin with an opening of ours
_LONGEST_OPENING = 24


@torch.inference_mode()
def write_rows(target: Llama, settings: Settings) -> Tensor:
    """Rows of texts, (rows, length) int16, on the device; row i has temperature i % len(TEMPERATURES)."""
    rng, start = random.Random(settings.seed), time.time()
    tokenizer = Tokenizer.from_file(str(settings.target_folder / "tokenizer.json"))
    written: list[Tensor] = []
    while not written or time.time() - start < settings.write_seconds:
        forced = openings(tokenizer, settings, rng)
        written.append(write_batch(target, forced, settings).to(torch.int16))
    rows = torch.cat(written)
    stories = int((rows == EOS).sum())
    print(
        f"wrote {rows.numel() / 1e6:.1f}M tokens, {stories} stories, in {time.time() - start:.0f} s",
        flush=True,
    )
    return rows


def write_batch(target: Llama, forced: Tensor, settings: Settings) -> Tensor:
    """A batch of rows (rows, length); `forced` (rows, n) begins them, and is -1 where the target chooses."""
    rows, device = settings.rows, settings.device
    heat = torch.tensor([TEMPERATURES[i % len(TEMPERATURES)] for i in range(rows)], device=device)[:, None]
    caches = target.new_caches(rows, settings.length)
    text = torch.empty(rows, settings.length, dtype=torch.long, device=device)
    text[:, 0] = BOS
    for at in range(settings.length - 1):
        logits = target(text[:, at : at + 1], caches, at)[:, 0].float()
        noise = -torch.empty_like(logits).exponential_().log()  # Gumbel's
        chosen = (logits + heat * noise).argmax(-1)
        # A new story follows the end of one, as in the rows that the target was trained on.
        chosen = torch.where(text[:, at] == EOS, BOS, chosen)
        if at + 1 < forced.shape[1]:
            chosen = torch.where(forced[:, at + 1] >= 0, forced[:, at + 1], chosen)
        text[:, at + 1] = chosen
    return text


def openings(tokenizer: Tokenizer, settings: Settings, rng: random.Random) -> Tensor:
    """What rows begin with, (rows, n); -1 where nothing is forced."""
    forced = torch.full((settings.rows, _LONGEST_OPENING), -1)
    for row in forced:
        if rng.random() < _OPENED:
            ids = tokenizer.encode(random_opening(rng), add_special_tokens=False).ids
            ids = ids[: _LONGEST_OPENING - 1]
            row[1 : 1 + len(ids)] = torch.tensor(ids)
    return forced.to(settings.device)
