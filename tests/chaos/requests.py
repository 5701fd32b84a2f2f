"""What the clients ask for, and what transformers says is the answer."""

from __future__ import annotations

import inspect
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import p2pinfer.models
from p2pinfer.generation.generation import GenerationConfig
from p2pinfer.models.text.sampling import Sampler, SamplingConfig
from p2pinfer.models.text.text import Tokenizer, load_tokenizer

from ..e2e.support import prompt_of

FOLDER = Path(p2pinfer.models.__path__[0]) / "tiny-stories"


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is continued."""

    prompt: str
    config: GenerationConfig


@cache
def tokenizer() -> Tokenizer:
    """The bundled model's."""
    return load_tokenizer(FOLDER)


def make_requests(count: int = 12) -> list[Request]:
    """The same ones in every process: short and long prompts, greedy and drawn."""
    rng = random.Random(count)
    requests: list[Request] = []
    for index in range(count):
        prompt = prompt_of(tokenizer(), rng.choice((6, 20, 80, 300)))
        drawn: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": index} if index % 2 else {}
        requests.append(Request(prompt, GenerationConfig(max_new_tokens=rng.randint(16, 48), **drawn)))
    return requests


def history(seed: int | None, tokens: int = 512, new_tokens: int = 24) -> Request:
    """One with so many tokens before the first new one; drawn if there is a seed."""
    drawn: dict[str, Any] = {} if seed is None else {"temperature": 0.8, "top_p": 0.95, "seed": seed}
    return Request(prompt_of(tokenizer(), tokens), GenerationConfig(max_new_tokens=new_tokens, **drawn))


def expected_ids(requests: list[Request]) -> list[list[int]]:
    """What transformers generates for each, drawn by the same rule."""
    from transformers import AutoModelForCausalLM, logging

    quiet: Any = logging
    quiet.disable_progress_bar()
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager")
    torch.set_num_threads(1)
    return [_continue(model, request) for request in requests]


def _continue(model: Any, request: Request) -> list[int]:
    config = request.config
    sampler = Sampler(
        SamplingConfig(config.temperature or 0, config.top_p or 1, config.top_k or 0, config.seed or 0)
    )
    ids = tokenizer().encode(request.prompt)
    new: list[int] = []
    fed, kept = ids, _empty_cache(model)
    while len(new) < (config.max_new_tokens or 0) and not (new and new[-1] in tokenizer().eos_ids):
        with torch.inference_mode():
            output = model(torch.tensor([fed]), use_cache=True, logits_to_keep=1, **kept)
        new.append(sampler.pick(output.logits[0, -1].float(), len(ids) + len(new)))
        fed = new[-1:]
    return new


def _empty_cache(model: Any) -> dict[str, Any]:
    """A cache under the name that this release of transformers has for it."""
    from transformers import DynamicCache

    cache_type: Any = DynamicCache
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache_type(config=model.config)}
