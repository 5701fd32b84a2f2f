"""From the sampler's log to training rows: filter the stories, train the tokenizer, encode, pack."""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .generate import CUT, SKIP
from .settings import BOS, EOS, STUDENT, Settings

# What quotes, dashes and dots become; among them UTF-8 that was read as Windows-1252.
_PLAIN = (
    ("â€œ", '"'),
    ("â€™", "'"),
    ("â€˜", "'"),  # noqa: RUF001
    ("â€", '"'),
    ("“", '"'),
    ("”", '"'),
    ("’", "'"),  # noqa: RUF001
    ("‘", "'"),  # noqa: RUF001
    ("–", "-"),  # noqa: RUF001
    ("—", "-"),
    ("…", "..."),
)
_LEAST_TOKENS = 40
_UNLIKELIEST = 0.1  # of the stories are dropped: those that the teacher itself finds least likely
_TOGETHER = 2000  # stories that are encoded in one call
_SEPARATOR = "\f"  # between stories in a file


def build_corpus(settings: Settings) -> None:
    """Write --work/tokenizer.json and rows_NN.npy, (rows, length) of int16 each."""
    start, fork = time.time(), multiprocessing.get_context("fork")
    parts = [(settings, part) for part in range(settings.workers)]
    with fork.Pool(settings.workers) as pool:
        total, kept, characters = np.sum(pool.starmap(filter_stories, parts), 0)
    print(
        f"kept {kept} of {total} stories, {characters / 1e6:.0f} MB ({time.time() - start:.0f} s)", flush=True
    )
    given = f"{settings.init}/tokenizer.json"
    tokenizer = Tokenizer.from_file(given) if settings.init else train_tokenizer(settings)
    tokenizer.save(str(settings.in_work("tokenizer.json")))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are parallel already
    with fork.Pool(settings.workers) as pool:
        tokens, rows = np.sum(pool.starmap(encode_rows, parts), 0)
    print(
        f"vocabulary {tokenizer.get_vocab_size()}; {tokens / 1e6:.1f}M tokens, "
        f"{rows} rows of {settings.length} ({time.time() - start:.0f} s)",
        flush=True,
    )


def clean(text: str) -> str:
    """Plain ASCII quotes and single line breaks, which is how the teacher separates paragraphs."""
    for marked, plain in _PLAIN:
        text = text.replace(marked, plain)
    return re.sub(r"\s*\n\s*", "\n", text.strip())


def filter_stories(settings: Settings, part: int) -> tuple[int, int, int]:
    """Cut one worker's share of the log into stories and keep the sound ones, each once.

    Returns:
        How many there were, how many are kept, and their characters.
    """
    tokens = np.load(settings.in_work("tokens.npy"), mmap_mode="r")
    log_p = np.load(settings.in_work("logp.npy"), mmap_mode="r")
    pieces = teacher_pieces(settings)
    kept: dict[str, float] = {}
    total = 0
    for row in range(part, len(tokens), settings.workers):
        written = tokens[row] != SKIP
        ids, scores = tokens[row][written], log_p[row][written].astype(np.float32)
        ends = np.flatnonzero((ids == EOS) | (ids == CUT))
        total += max(0, len(ends) - 1)
        # A row's first story lost its beginning to the warm-up steps.
        for start, end in zip(ends[:-1] + 1, ends[1:], strict=True):
            story: list[int] = ids[start:end].tolist()
            text = clean("".join([pieces[i] for i in story]))
            if ids[end] == EOS and end - start >= _LEAST_TOKENS and is_sound(text, settings.novelty):
                chosen = scores[start : end + 1]  # 0 where the token was forced
                kept[text] = chosen.sum() / max(1, (chosen != 0).sum())
    floor = np.quantile(list(kept.values()), _UNLIKELIEST) if kept else 0.0
    texts = [text for text, score in kept.items() if score >= floor]
    _stories_file(settings, part).write_text(_SEPARATOR.join(texts))
    return total, len(texts), sum(map(len, texts))


def is_sound(text: str, novelty: float) -> bool:
    """Whether a story is ASCII, ends a sentence, closes its quotes and does not repeat itself too much."""
    if not text or not text.isascii() or text[-1] not in '.!?"' or text.count('"') % 2:
        return False
    words = text.split()
    runs = set(zip(words, words[1:], words[2:], words[3:], strict=False))
    return len(runs) >= novelty * (len(words) - 3)


def teacher_pieces(settings: Settings) -> list[str]:
    """What each of the teacher's tokens stands for; bytes beyond ASCII as U+FFFD."""
    vocab = Tokenizer.from_file(f"{settings.teacher}/tokenizer.json").get_vocab()
    pieces: list[str] = [""] * len(vocab)
    for piece, i in vocab.items():
        is_byte = re.fullmatch(r"<0x..>", piece)
        pieces[i] = (
            bytes([int(piece[3:5], 16)]).decode("ascii", "replace") if is_byte else piece.replace("▁", " ")
        )
    return pieces


def train_tokenizer(settings: Settings) -> Tokenizer:
    """A byte-level BPE on up to 60,000 stories of each of four workers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=STUDENT["vocab_size"],
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(settings), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def encode_rows(settings: Settings, part: int) -> tuple[int, int]:
    """Encode one worker's stories as <s> story </s> and pack them.

    A row starts with the story that the last one cut.

    Returns:
        How many tokens there were, and how many rows they make.
    """
    tokenizer = Tokenizer.from_file(str(settings.in_work("tokenizer.json")))
    texts = _read_stories(settings, part)
    encoded: list[Any] = [
        np.array([BOS, *encoding.ids, EOS], dtype=np.int16)
        for first in range(0, len(texts), _TOGETHER)
        for encoding in tokenizer.encode_batch_fast(
            texts[first : first + _TOGETHER], add_special_tokens=False
        )
    ]
    starts: Any = np.cumsum([0] + [len(story) for story in encoded])[:-1]
    ids = np.concatenate(encoded)
    rows: list[int] = []
    story = 0
    while story < len(starts) and starts[story] + settings.length <= len(ids):
        rows.append(int(starts[story]))
        following: int = starts.searchsorted(starts[story] + settings.length, "right")
        story = max(story + 1, following - 1)
    at = np.add.outer(np.array(rows, dtype=np.int64), np.arange(settings.length))
    np.save(settings.in_work(f"rows_{part:02d}.npy"), ids[at])
    return len(ids), len(rows)


def _sample(settings: Settings) -> Iterator[str]:
    for part in range(min(4, settings.workers)):
        yield from _read_stories(settings, part)[:60_000]


def _read_stories(settings: Settings, part: int) -> list[str]:
    return _stories_file(settings, part).read_text().split(_SEPARATOR)


def _stories_file(settings: Settings, part: int) -> Path:
    return settings.in_work(f"stories_{part:02d}.txt")
