"""How good the student is: bits per byte on held-out stories, and a few continuations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from .corpus import clean
from .settings import BOS, EOS, Settings

PROMPTS = (
    "Once upon a time",
    "Tom and his dog went to",
    "The little red robot",
    "Lily found a key under",
    "One rainy day, a small green frog",
)
MODES: tuple[dict[str, Any], ...] = (
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.7, "top_k": 0},
)
_ROWS = 16

Encode = Callable[[str], list[int]]


@torch.no_grad()
def evaluate(settings: Settings) -> None:
    """Print bits per byte of student and teacher, if there are held-out stories, and continuations."""
    stories = held_out_stories(settings)
    for name, folder, context in (("student", settings.out, 1024), ("teacher", settings.teacher, 256)):
        tokenizer: Any = cast("Any", transformers.AutoTokenizer).from_pretrained(folder)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=settings.eval_dtype)
        model = model.to(settings.device).eval()

        def encode(text: str, tokenizer: Any = tokenizer) -> list[int]:
            ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            return ids

        if stories:
            bits = bits_per_byte(model, encode, stories, context, settings.device)
            print(f"{name}: {bits:.4f} bits per byte ({settings.eval_dtype})", flush=True)
        if name == "student":
            print_continuations(model, tokenizer, settings.device)


def held_out_stories(settings: Settings) -> list[str]:
    """The stories of --heldout: they end at one line break, paragraphs at two.

    Those of one paragraph may be pieces of others, so they are left out.
    """
    path = Path(settings.heldout)
    if not path.exists():
        print(f"there is no {path}: no bits per byte")
        return []
    parts = re.split(r"(?<!\n)\n(?!\n)", path.read_text())
    stories = [clean(part) for part in parts if "\n\n" in part.strip()][: settings.eval_docs]
    print(f"held out: {len(stories)} stories, {_byte_length(stories)} bytes")
    return stories


def bits_per_byte(model: Any, encode: Encode, stories: Sequence[str], context: int, device: str) -> float:
    """What a byte costs, each story after <s>.

    Where a story outgrows the context, it is read in windows that start half a context further each.
    """
    windows: list[tuple[list[int], int]] = []  # tokens, and the first of them that counts
    for ids in ([BOS, *encode(story)] for story in stories):
        for start in range(0, max(1, len(ids) - context // 2), context // 2):
            windows.append((ids[start : start + context], context // 2 if start else 1))
    windows.sort(key=lambda window: len(window[0]))
    nats = 0.0
    for first in range(0, len(windows), _ROWS):
        group = windows[first : first + _ROWS]
        ids, counted = torch.full((2, len(group), max(len(tokens) for tokens, _ in group)), BOS)
        for i, (tokens, skip) in enumerate(group):
            ids[i, : len(tokens)], counted[i, skip : len(tokens)] = torch.tensor(tokens), -1
        log_p = model(ids.to(device)).logits[:, :-1].float().log_softmax(-1)
        log_p = log_p.gather(2, ids[:, 1:, None].to(device))[..., 0]
        nats -= log_p[counted[:, 1:].to(device) < 0].double().sum().item()
    return nats / math.log(2) / _byte_length(stories)


def print_continuations(model: Any, tokenizer: Any, device: str) -> None:
    """What the student writes after each prompt, greedily and at a temperature of 0.7."""
    for mode in MODES:
        for seed, prompt in enumerate(PROMPTS):
            torch.manual_seed(seed)
            asked = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
            ids = model.generate(**asked, max_new_tokens=400, **mode)[0]
            how = "T=0.7" if mode["do_sample"] else "greedy"
            ending = "ended" if ids[-1] == EOS else "CUT"
            text = tokenizer.decode(ids, skip_special_tokens=True)
            print(f"\n--- {how}, {len(ids)} tokens, {ending}\n{text}", flush=True)


def _byte_length(stories: Iterable[str]) -> int:
    return sum(len(story.encode()) for story in stories)
