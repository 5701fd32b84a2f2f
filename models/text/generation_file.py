"""Generation defaults of a model, read from its generation_config.json as transformers reads it.

Where there is no such file, transformers looks for the same names in config.json, and so does this. What
neither names has the default of transformers' `generate`; so a model that is to be sampled, of which no
top_k is said, draws among 50.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from p2pinfer.errors import CheckpointError, ConfigError
from p2pinfer.models.checkpoint.spec import read_json

from .sampling_config import LogitsRules, SamplingConfig

FILE: Final = "generation_config.json"
_TOP_K: Final = 50  # transformers' own, where the model is to be sampled
# What would change the text and is not done here; with the values that change nothing.
_LEFT_OUT: Final[Mapping[str, Sequence[object]]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "token_healing": (False,),
    "num_return_sequences": (1,),
    "max_time": (),
}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Generation settings of a model, for whatever the user leaves open."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rules: LogitsRules = field(default_factory=LogitsRules)
    max_new_tokens: int | None = None  # tokens
    max_length: int | None = None  # the same, the prompt counted; `max_new_tokens` goes before it
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    left_out: tuple[str, ...] = ()  # what the file asks for and is not done


class _File(msgspec.Struct, forbid_unknown_fields=False):
    """Fields of the file that are used; None is the same as a name that is missing."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_h: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = None
    encoder_repetition_penalty: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    remove_invalid_values: bool | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    stop_strings: str | tuple[str, ...] | None = None


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """Generation settings in the files of a model folder.

    Raises:
        CheckpointError: A file is damaged, or a value makes no sense.
    """
    path = next((folder / name for name in (FILE, "config.json") if (folder / name).is_file()), None)
    content = (read_json(path) or {}) if path is not None else {}
    try:
        file = msgspec.convert(content, _File)
        return GenerationDefaults(
            _sampling(file),
            _rules(file),
            file.max_new_tokens,
            file.max_length,
            (file.stop_strings,) if isinstance(file.stop_strings, str) else file.stop_strings or (),
            tuple(name for name, neutral in _LEFT_OUT.items() if _asks(content.get(name), neutral)),
        )
    except (msgspec.ValidationError, ConfigError) as exc:
        raise CheckpointError(f"{path} has an invalid value: {exc}; correct or remove that field") from exc


def _sampling(file: _File) -> SamplingConfig:
    samples = bool(file.do_sample)
    temperature = 1.0 if file.temperature is None else file.temperature
    top_k = (_TOP_K if samples else 0) if file.top_k is None else file.top_k
    said = _said(file, "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
    return SamplingConfig(temperature=temperature if samples else 0.0, top_k=top_k, **said)


def _rules(file: _File) -> LogitsRules:
    said = _said(file, *(name for name in LogitsRules.__slots__ if name != "forced_eos_token_id"))
    forced = file.forced_eos_token_id
    return LogitsRules(**said, forced_eos_token_id=(forced,) if isinstance(forced, int) else forced or ())


def _said(file: _File, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(file, name)) is not None}


def _asks(value: object, neutral: Sequence[object]) -> bool:
    return value is not None and value not in neutral
