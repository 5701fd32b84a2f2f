"""Settings of a client: routing, sampling, sessions and audits.

Apart from the code that goes by it, so that a wrong setting is told before torch is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from p2pinfer.models.config import check_target
from p2pinfer.models.field_types import check_fields
from p2pinfer.models.text.sampling_config import LogitsRules, SamplingConfig

from .errors import ConfigError
from .text_files import is_text

DRAWN_BY: Final = ("temperature", "top_p", "top_k", "min_p", "typical_p")
MAX_DEPTH: Final = 32  # guesses in one trip
METHODS: Final = ("lora", "prompt")  # of tuning
RULED_BY: Final = ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Settings of a client's place in the swarm and of its routes."""

    policy: str = "risk-adjusted"  # a built-in routing policy's name, or module:Class
    find_timeout_s: float = 6.0  # how long to wait for peers that together serve every block, seconds
    wait_s: float = 60.0  # how long a started text waits for a replacement of a failed peer, seconds
    policy_timeout_s: float = 5.0  # time limit of a routing policy's choice, seconds
    busy_pause_s: float = 2.0  # back-off after a peer refused for lack of capacity, seconds
    max_attempts: int = 8  # routes tried in a row before a pause, or, before the first token, an error
    identity_file: Path | None = None  # file of a permanent identity; not set: a new peer id at every start
    # guesses sent along with a token: auto: as many as pay, off, or a number from 1 to 32
    speculate: str = "auto"
    # small model with the same tokenizer that guesses tokens: a folder or a Hugging Face id; off: none; auto:
    # the one that is bundled with the bundled model
    draft: str = "auto"
    # hold no weights: the first hop embeds, and the last one draws: on, off, or auto: where they do not fit
    thin: str = "auto"
    # how a prompt's hidden states travel: off: as they are, int8: in 8 bits a value, which rounds them, auto:
    # so where the line from here was found slow
    prefill_codec: str = "off"
    dtype: str = "auto"  # of the embedding and the head: auto, float32, bfloat16 or float16
    device: str = "auto"  # where embedding and head are computed: auto, cpu, cuda

    def __post_init__(self) -> None:
        check_fields(self)
        check_target(self.dtype, self.device)
        if self.thin not in ("auto", "on", "off"):
            raise ValueError(f"thin is {self.thin!r}; it takes auto, on or off")
        if self.prefill_codec not in ("off", "auto", "int8"):
            raise ValueError(f"prefill_codec is {self.prefill_codec!r}; it takes off, auto or int8")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}; it must be 1 or more")
        if self.speculate not in ("auto", "off") and not (
            self.speculate.isascii() and self.speculate.isdigit() and 1 <= int(self.speculate) <= MAX_DEPTH
        ):
            raise ValueError(f"speculate is {self.speculate!r}; it takes auto, off, or 1 to {MAX_DEPTH}")
        for name in ("find_timeout_s", "policy_timeout_s", "busy_pause_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be above 0")
        if self.wait_s < 0:
            raise ValueError(f"wait_s is {self.wait_s:g}; it must be 0 or more")


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """Settings of a generation. None is as the model's generation_config.json says."""

    max_new_tokens: int | None = None  # tokens; where the model does not say, 128
    temperature: float | None = None  # 0: greedy; higher: more varied; else 0
    top_p: float | None = None  # sample from the likeliest tokens with this total probability; else 1
    # sample from this many likeliest tokens; 0: all; else 0, or 50 if it samples
    top_k: int | None = None
    min_p: float | None = None  # lowest probability relative to the likeliest token; else 0
    typical_p: float | None = None  # locally typical sampling: total probability; else 1
    seed: int | None = None  # the same seed and prompt repeat a text; not set: random
    # above 1: repeated tokens are less likely, prompt included; else 1
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None  # no sequence of this many tokens repeats; 0: off; else 0
    min_new_tokens: int | None = None  # the text does not end before this many tokens; else 0
    # added to the logits of these token ids; -inf forbids one
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    stop: tuple[str, ...] = ()  # the text ends before the first of these; special tokens may be among them
    stop_ids: tuple[int, ...] = ()  # the text ends before the first of these tokens
    show_special: bool = False  # print special tokens too
    # JSON schema, or grammar in llguidance's form of Lark, that the text follows; not set: none
    grammar: str | None = None
    # with each token its log probability, and those of this many likeliest ones; not set: none
    logprobs: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more")
        if self.logprobs is not None and self.logprobs < 0:
            raise ConfigError(f"logprobs is {self.logprobs}; it must be 0 or more")
        if not all(is_text(text) for text in self.stop):
            raise ConfigError("a stop contains half of a surrogate pair, which is not valid text; remove it")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 63:
            raise ConfigError(f"seed is {self.seed}; it must fit into 64 bits")
        for token_id, bias in self.logit_bias.items():
            if math.isnan(bias) or bias == math.inf:
                raise ConfigError(f"logit_bias is {bias} for token {token_id}; it must be finite, or -inf")
        SamplingConfig(**said(self, *DRAWN_BY))
        LogitsRules(**said(self, *RULED_BY))


def said(config: GenerationConfig, *names: str) -> dict[str, Any]:
    """Fields that are not left open."""
    return {name: value for name in names if (value := getattr(config, name)) is not None}


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """Settings of a client's sessions."""

    chunk_tokens: int = 256  # longer prompts are sent in chunks of at most this many tokens
    chunks_in_flight: int = 24  # chunks sent before the first one's result is awaited
    open_timeout_s: float = 15.0  # for opening a session on every hop of a route, seconds
    step_timeout_s: float = 60.0  # for one result, seconds; a slower hop counts as failed
    probe_after_s: float = 1.0  # without a result for this long, hops are pinged, seconds
    probe_timeout_s: float = 1.5  # a hop that does not answer the ping in time counts as failed, seconds
    repair_timeout_s: float = 5.0  # for one attempt to replace a failed hop, seconds
    max_repairs: int = 8  # attempts in a row
    slow_step_s: float = 0.05  # per token, seconds; a slower hop is replaced if another would halve it

    def __post_init__(self) -> None:
        check_fields(self)
        for each in fields(self):
            value = getattr(self, each.name)
            if value <= 0:
                raise ValueError(f"{each.name} is {value:g}; it must be above 0")


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """Settings of audits: how often, and what they may take."""

    # share of hops to audit, 0 to 1; not set: higher for less-known peers
    rate: float | None = None
    # processor time of audits, of what hops spend on this client's sessions; above 0 to 1. New peers may take
    # more at first, which is repaid
    share: float = 0.013
    logits_share: float = 0.1  # share of audits of inner hops that also compare logits, 0 to 1
    memory_bytes: int = 0  # memory for weights to audit with, bytes; 0: a quarter of free memory
    download_bytes: int = 1 << 30  # download limit of one audit, bytes; beyond it, other peers run the blocks
    max_tokens: int = 4096  # longer sessions are audited up to this many tokens
    evidence_bytes: int = 32 << 20  # tensors to fetch for one audit, from the session's start, bytes
    timeout_s: float = 60.0  # for the evidence of one audit, and again for second opinions, seconds
    proofs_share: float = 0.02  # share of time for checking fraud proofs of others, above 0 to 1
    training_share: float = 0.1  # share of time for audits of a training, after each hop's first ones
    linger_s: float = 10.0  # how long a closing client waits for its audits, seconds
    # audits that a client leaves to the next one, in data_dir, bytes; 0: none are kept
    queue_bytes: int = 64 << 20
    own_peers: tuple[str, ...] = ()  # your own peers, which do not count as independent second opinions
    remote: bool = True  # let other peers re-execute spans that do not fit here, and confirm failures

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise ValueError(f"rate is {self.rate:g}; it must be from 0 to 1")
        if not 0 <= self.logits_share <= 1:
            raise ValueError(f"logits_share is {self.logits_share:g}; it must be from 0 to 1")
        for name in ("share", "proofs_share", "training_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be above 0 and at most 1")
        for name in ("max_tokens", "evidence_bytes", "timeout_s", "linger_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be above 0")
        for name in ("memory_bytes", "download_bytes", "queue_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


@dataclass(frozen=True, slots=True)
class VerifyConfig:
    """Settings of a node's idle-time audits."""

    enabled: bool = False  # audit other peers while this node is idle
    share: float = 0.05  # share of time for audits, above 0 to 1
    idle_s: float = 10.0  # how long the node must have been idle, seconds
    pause_s: float = 30.0  # minimum pause between two rounds, seconds
    texts: int = 3  # texts generated under one identity
    max_new_tokens: int = 128  # tokens of one text at most; fewer than 24 prove little
    prompts: Path | None = None  # file of texts that prompts are taken from; not set: the model's own texts

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share:g}; it must be above 0 and at most 1")
        if self.idle_s < 0 or self.pause_s < 0:
            raise ValueError("idle_s and pause_s must not be negative")
        if min(self.texts, self.max_new_tokens) < 1:
            raise ValueError("texts and max_new_tokens must be 1 or more")


@dataclass(frozen=True, slots=True)
class TuneConfig:
    """Settings of a training over the swarm."""

    method: str = "lora"  # what is trained: lora, or prompt: virtual tokens before every text
    rank: int = 8  # of LoRA's matrices
    alpha: float = 16.0  # scale of LoRA, divided by the rank
    targets: tuple[str, ...] = ()  # products that take LoRA, such as q_proj; empty: all of them
    prompt_tokens: int = 16  # virtual tokens of a prompt
    learning_rate: float | None = None  # AdamW's; not set: 5e-4 for LoRA, 1e-2 for a prompt
    weight_decay: float = 0.0  # AdamW's
    max_gradient_norm: float = 1.0  # longer gradients are shortened to it; 0: none is
    warmup_steps: int = 0  # steps in which the learning rate rises from 0
    batch_rows: int = 8  # texts of one step
    epochs: int = 1  # times that every text is used
    max_tokens: int = 512  # longer texts are cut, tokens
    seed: int = 0  # of the first values, and of the order of the texts
    checkpoint_steps: int = 20  # steps between two checkpoints

    def __post_init__(self) -> None:
        check_fields(self)
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; it takes {' or '.join(METHODS)}")
        for name in ("rank", "prompt_tokens", "batch_rows", "epochs", "max_tokens", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("weight_decay", "max_gradient_norm", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be 0 or more")
        if self.alpha <= 0:
            raise ValueError(f"alpha is {self.alpha:g}; it must be above 0")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate:g}; it must be above 0")

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        rate = self.learning_rate or (5e-4 if self.method == "lora" else 1e-2)
        return rate * min(1.0, (step + 1) / (self.warmup_steps + 1))
