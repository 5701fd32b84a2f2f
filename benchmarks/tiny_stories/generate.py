"""A batched sampler for the teacher: every row writes story after story, and what it writes is logged.

One decoder step for all rows is captured as a CUDA graph and replayed for every token, so everything that
changes lies in tensors that are written in place.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from .openings import random_opening
from .settings import BOS, EOS, Settings

# Marks in the log: a token that is in it already; a story that was given up. EOS marks a story that is done.
SKIP, CUT = -1, 0

_OPENINGS = 20_000


@torch.no_grad()
def generate(settings: Settings) -> None:
    """Write --work/tokens.npy and logp.npy, (rows, steps) each: the tokens and their log-probabilities."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    torch.manual_seed(settings.seed)
    writers = Writers(settings, Teacher(Path(settings.teacher), settings.rows, device, dtype), device)
    step = captured(writers.step) if on_gpu else writers.step
    logs: list[tuple[np.ndarray, np.ndarray]] = []
    start = time.time()
    while time.time() - start < settings.gen_seconds:
        writers.rewind_log()
        for _ in range(settings.chunk):
            step()
        logs.append(writers.log())
    seconds = time.time() - start
    tokens, log_p = (np.concatenate(parts, 1) for parts in zip(*logs, strict=True))
    np.save(settings.in_work("tokens.npy"), tokens)
    np.save(settings.in_work("logp.npy"), log_p)
    print(
        f"generated {tokens.size / 1e6:.1f}M tokens in {seconds:.0f} s: "
        f"{seconds / tokens.shape[1] * 1e3:.2f} ms a step, {(tokens == EOS).sum()} stories, "
        f"{(tokens == CUT).sum()} given up, {(tokens == SKIP).mean():.1%} re-read",
        flush=True,
    )


class Teacher:
    """A multi-head Llama decoder with a static cache; every row of the batch has its own position."""

    def __init__(self, folder: Path, rows: int, device: str, dtype: torch.dtype) -> None:
        config = json.loads((folder / "config.json").read_text())
        stored: dict[str, Tensor] = cast("Any", safetensors.torch).load_file(folder / "model.safetensors")
        weights = {name.removeprefix("model."): tensor.to(device, dtype) for name, tensor in stored.items()}
        self.positions: int = config["max_position_embeddings"]
        self.heads: int = config["num_attention_heads"]
        self.head_dim: int = config["hidden_size"] // self.heads
        self.embedding, self.norm = weights["embed_tokens.weight"], weights["norm.weight"]
        blocks: int = config["num_hidden_layers"]

        def joined(block: int, *names: str) -> Tensor:
            parts = [weights[f"layers.{block}.{name}.weight"] for name in names]
            return torch.cat(parts).t().contiguous()

        self.layers = [
            (
                joined(i, "input_layernorm"),
                joined(i, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                joined(i, "self_attn.o_proj"),
                joined(i, "post_attention_layernorm"),
                joined(i, "mlp.gate_proj", "mlp.up_proj"),
                joined(i, "mlp.down_proj"),
            )
            for i in range(blocks)
        ]
        cache = torch.zeros(
            2, blocks, rows, self.heads, self.positions, self.head_dim, device=device, dtype=dtype
        )
        self.keys, self.values = cache
        frequencies = 10000.0 ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angle = torch.outer(torch.arange(self.positions), frequencies).to(device)
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)
        self.row = torch.arange(rows, device=device)
        self.attend = torch.compile(attend, disable=device == "cpu")

    def logits(self, token: Tensor, position: Tensor) -> Tensor:
        """The next token's logits (rows, vocab), after each row's token (rows,) at its position (rows,)."""
        hidden = self.embedding[token]
        cos, sin = self.cos[position][:, None], self.sin[position][:, None]
        for i, (attention_norm, qkv, output, mlp_norm, gate_up, down) in enumerate(self.layers):
            mixed = (_norm(hidden, attention_norm) @ qkv).view(len(token), 3 * self.heads, self.head_dim)
            first, second = mixed[:, : 2 * self.heads].chunk(2, -1)
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
            query, key = turned.chunk(2, 1)
            self.keys[i][self.row, :, position] = key
            self.values[i][self.row, :, position] = mixed[:, 2 * self.heads :]
            attended = self.attend(query, self.keys[i], self.values[i], position)
            hidden = hidden + attended.view(len(token), -1) @ output
            gate, up = (_norm(hidden, mlp_norm) @ gate_up).chunk(2, -1)
            hidden = hidden + (functional.silu(gate) * up) @ down
        return _norm(hidden, self.norm) @ self.embedding.T


class Writers:
    """The rows: where each stands in its story, what it is to write next, and the log.

    A story that outgrows the teacher's window goes on, once, from the window's second half: those tokens are
    forced again from the window's start. A story that outgrows it a second time is given up.
    """

    def __init__(self, settings: Settings, teacher: Teacher, device: str) -> None:
        rows, self.window, self.teacher, self.device = settings.rows, teacher.positions, teacher, device
        self.cool, self.min_p = settings.cool, settings.min_p
        self.draw = torch.compile(draw, disable=device == "cpu")
        self.row = torch.arange(rows, device=device)
        self.openings = encoded_openings(settings, self.window).to(device)
        self.forced, self.temperature = self.random_openings(), self.random_temperatures()
        self.slid = self.row < 0
        self.token, self.position = self.row * 0 + BOS, self.row * 0
        self.history = torch.zeros(rows, self.window, dtype=torch.long, device=device)
        self.logged = torch.zeros(1, dtype=torch.long, device=device)
        self.log_token = torch.zeros(settings.chunk, rows, dtype=torch.int16, device=device)
        self.log_p = torch.zeros(settings.chunk, rows, dtype=torch.half, device=device)

    def random_openings(self) -> Tensor:
        """For every row the tokens that are forced at each position, -1 where the teacher chooses."""
        return self.openings[torch.randint(len(self.openings), (len(self.row),), device=self.device)]

    def random_temperatures(self) -> Tensor:
        return torch.where(torch.rand(len(self.row), device=self.device) < 0.5, self.cool, 1.0)

    def rewind_log(self) -> None:
        self.logged.zero_()

    def log(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens and log-probabilities of the last chunk, (rows, chunk)."""
        return self.log_token.T.contiguous().cpu().numpy(), self.log_p.T.contiguous().cpu().numpy()

    def step(self) -> None:
        """Write one token in every row."""
        window, row = self.window, self.row
        logits = self.teacher.logits(self.token, self.position)
        new, log_p = self.draw(logits, self.temperature, self.min_p)
        self.history[row, self.position] = self.token
        at = self.position + 1
        wanted = self.forced[row, at]
        new, log_p = torch.where(wanted >= 0, wanted, new), torch.where(wanted >= 0, 0, log_p)
        end = (new == BOS) | (new == EOS)  # the teacher ends a story with either
        full = (at == window) & ~end
        cut, slide = full & self.slid, full & ~self.slid
        fresh = end | cut
        written = torch.where(end, EOS, torch.where(cut, CUT, new))
        written = torch.where(self.slid & (wanted >= 0), SKIP, written)
        self.log_token.index_copy_(0, self.logged, written[None].to(torch.int16))
        self.log_p.index_copy_(0, self.logged, log_p[None].half())
        free = torch.full((len(row), window // 2), -1, device=self.device)
        again = torch.cat([self.history[:, window // 2 :], new[:, None], free], 1)
        kept = torch.where(slide[:, None], again, self.forced)
        self.forced.copy_(torch.where(fresh[:, None], self.random_openings(), kept))
        self.token.copy_(torch.where(fresh | slide, self.forced[:, 0], new))
        self.position.copy_(torch.where(fresh | slide, 0, at))
        self.temperature.copy_(torch.where(fresh, self.random_temperatures(), self.temperature))
        self.slid.copy_(~fresh & (self.slid | slide))
        self.logged.add_(1)


def attend(query: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """One query per row and head over the row's cached positions; compiled, it reads the cache once."""
    live = torch.arange(keys.shape[2], device=query.device) <= position[:, None]
    score = (query[:, :, None] * keys).float().sum(-1) / math.sqrt(query.shape[-1])
    share = score.masked_fill(~live[:, None], -math.inf).softmax(-1)
    return (share[..., None] * values).sum(2).to(query.dtype)


def draw(logits: Tensor, temperature: Tensor, min_p: float) -> tuple[Tensor, Tensor]:
    """A token per row, of those at least `min_p` times as likely as the best, and its log-probability."""
    scores = logits.float()
    scores = scores - scores.amax(-1, keepdim=True)
    heated = scores / temperature[:, None]
    gumbel = -(-torch.rand_like(heated).log()).log()
    token = torch.where(heated < math.log(min_p), -math.inf, heated + gumbel).argmax(-1)
    return token, scores.gather(1, token[:, None])[:, 0] - scores.exp().sum(-1).log()


def encoded_openings(settings: Settings, window: int) -> Tensor:
    """(openings, window + 1) token ids, -1 where the teacher chooses; a share has random first words."""
    rng, tokenizer = random.Random(settings.seed), Tokenizer.from_file(f"{settings.teacher}/tokenizer.json")
    openings = torch.full((_OPENINGS, window + 1), -1)
    openings[:, 0] = BOS
    for i in range(int(_OPENINGS * settings.prompted)):
        ids = tokenizer.encode(random_opening(rng), add_special_tokens=False).ids
        openings[i, 1 : 1 + len(ids)] = torch.tensor(ids)
    return openings


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph. Its three warm-up steps cost every row the beginning of its first story."""
    torch.cuda.synchronize()
    stream: Any = torch.cuda.Stream
    with torch.cuda.stream(stream()):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(hidden, weight.shape, weight, 1e-5)
