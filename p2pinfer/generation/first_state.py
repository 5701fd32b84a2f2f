"""Initial state of a generation, from the request and the model's own files.

What a `GenerationConfig` leaves open, None or empty, is as those files say, and as transformers' `generate`
has it where they say nothing; but without a word from anybody a text is greedy, of 128 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Final

from p2pinfer.client_config import DRAWN_BY, RULED_BY, GenerationConfig, said
from p2pinfer.errors import ConfigError, PromptTooLong
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.text.chat_template import ChatPrompt
from p2pinfer.models.text.generation_file import GenerationDefaults
from p2pinfer.models.text.sampling_config import LogitsRules, SamplingConfig
from p2pinfer.models.text.text import Tokenizer
from p2pinfer.session.terms import Packing
from p2pinfer.suggestions import suggest
from p2pinfer.text_files import is_text

from .saved_state import GenerationState

_MAX_NEW_TOKENS: Final = 128
# Tokenizing takes a second for a few hundred thousand words, so of a prompt that is far too long only the
# beginning is looked at. Few texts have so many characters a token; where it is cut moves the last tokens.
_CHARS_PER_TOKEN: Final = 16
_EDGE_TOKENS: Final = 64


def generation_config(config: GenerationConfig | None, overrides: Mapping[str, object]) -> GenerationConfig:
    """`config` with single fields replaced.

    Raises:
        ConfigError: There is no such field, or a value makes no sense.
    """
    try:
        return replace(config or GenerationConfig(), **overrides)  # type: ignore[arg-type]
    except TypeError as exc:
        known = [each.name for each in fields(GenerationConfig)]
        nearest = next((suggest(name, known) for name in overrides if name not in known), "")
        raise ConfigError(f"{exc}{nearest}; see p2pinfer.GenerationConfig for what can be set") from exc


def new_state(
    spec: ModelSpec,
    tokenizer: Tokenizer,
    prompt: str | ChatPrompt,
    config: GenerationConfig,
    defaults: GenerationDefaults | None = None,
) -> GenerationState:
    """Initial state of a generation that continues `prompt`; where there is no seed, one is drawn.

    Args:
        defaults: What the model's own files say; nothing if None.

    Raises:
        PromptTooLong: The prompt leaves no room in the model's context.
        ConfigError: There is no token to begin with, or the model has no such token.
    """
    defaults = defaults or GenerationDefaults()
    prompt_ids = _encode(spec, tokenizer, prompt)
    for name, token_ids in (("stop_ids", config.stop_ids), ("logit_bias", config.logit_bias)):
        _check_known(spec, name, token_ids)
    sampling = replace(defaults.sampling, **said(config, *DRAWN_BY), seed=config.seed)
    return GenerationState(
        spec.model,
        spec.revision,
        prompt_ids,
        min(_length(config, defaults, len(prompt_ids)), spec.max_positions - len(prompt_ids)),
        sampling.temperature,
        sampling.top_p,
        sampling.top_k,
        sampling.seed_or_fresh,
        config.stop or defaults.stop,
        eos_ids=tuple(sorted(tokenizer.eos_ids)),
        stop_ids=config.stop_ids,
        show_special=config.show_special,
        min_p=sampling.min_p,
        typical_p=sampling.typical_p,
        top_h=sampling.top_h,
        epsilon_cutoff=sampling.epsilon_cutoff,
        eta_cutoff=sampling.eta_cutoff,
        rules=_rules(config, defaults),
        grammar=config.grammar or "",
    )


def sampling_of(state: GenerationState) -> SamplingConfig:
    """Sampling of a generation's tokens.

    Raises:
        ConfigError: Not like that.
    """
    return SamplingConfig(
        temperature=state.temperature,
        top_p=state.top_p,
        top_k=state.top_k,
        seed=state.seed,
        min_p=state.min_p,
        typical_p=state.typical_p,
        top_h=state.top_h,
        epsilon_cutoff=state.epsilon_cutoff,
        eta_cutoff=state.eta_cutoff,
    )


def packing_of(state: GenerationState, codec: str) -> Packing:
    """Positions to travel packed by `client.prefill_codec`; of a text that goes on, those that did.

    Never the prompt's last one: a hop that rounds to its liking could lead the first token astray by it.
    """
    if state.packed is not None or codec == "off":
        return Packing(state.packed or 0)
    return Packing(len(state.prompt_ids) - 1, if_slow=codec == "auto")


def check_lengths(spec: ModelSpec, tokens: int, prompt_tokens: int = 0) -> None:
    """Nothing, if the model can compute a session of `tokens` positions, `prompt_tokens` of them a prompt.

    Raises:
        PromptTooLong: Its context is shorter, or no prompt of that length can be computed in pieces.
    """
    if tokens > spec.max_positions:
        raise PromptTooLong(f"{tokens} tokens are asked for, and {spec.model} takes {spec.max_positions}")
    _check_limit(spec, prompt_tokens)


def _encode(spec: ModelSpec, tokenizer: Tokenizer, given: str | ChatPrompt) -> tuple[int, ...]:
    """The prompt's tokens, of which there is one at least, and room for one more."""
    prompt = given.text if isinstance(given, ChatPrompt) else given
    encode = partial(tokenizer.encode, add_special_tokens=prompt is given)
    if not is_text(prompt):
        raise ConfigError("the prompt contains half of a surrogate pair, which is not valid text; remove it")
    beginning = prompt[: _CHARS_PER_TOKEN * spec.max_positions]
    prompt_ids = tuple(encode(beginning))
    if len(prompt_ids) <= spec.max_positions + _EDGE_TOKENS and len(beginning) < len(prompt):
        prompt_ids = tuple(encode(prompt))
    if len(prompt_ids) >= spec.max_positions:
        over = "over " if len(beginning) < len(prompt) else ""
        raise PromptTooLong(
            f"the prompt is {over}{len(prompt_ids)} tokens long, but the context of {spec.model} is "
            f"{spec.max_positions} tokens, the answer included; shorten it"
        )
    _check_limit(spec, len(prompt_ids))
    if not prompt_ids:
        raise ConfigError(f"the prompt is empty and {spec.model} has no start token; write something")
    if (last := max(prompt_ids)) >= spec.vocab_size:
        raise ConfigError(
            f"{tokenizer.piece(last)!r} in the prompt is token {last} of the tokenizer of {spec.model}, but "
            f"its embedding ends with token {spec.vocab_size - 1}; remove it from the prompt"
        )
    return prompt_ids


def _check_limit(spec: ModelSpec, prompt_tokens: int) -> None:
    if spec.prompt_limit is not None and prompt_tokens > spec.prompt_limit:
        raise PromptTooLong(
            f"the prompt is {prompt_tokens} tokens long, but {spec.model} takes prompts of up to "
            f"{spec.prompt_limit}: in a longer one its rotary embedding depends on the length of the "
            f"whole prompt, which peers do not know; shorten it"
        )


def _check_known(spec: ModelSpec, name: str, token_ids: Mapping[int, float] | tuple[int, ...]) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < spec.vocab_size:
            raise ConfigError(f"{name} names token {token_id}; {spec.model} has 0 to {spec.vocab_size - 1}")


def _length(config: GenerationConfig, defaults: GenerationDefaults, prompt_tokens: int) -> int:
    """Largest number of tokens."""
    asked = config.max_new_tokens or defaults.max_new_tokens
    if asked is None and defaults.max_length is not None:
        asked = defaults.max_length - prompt_tokens
        if asked < 1:
            raise PromptTooLong(
                f"the prompt is {prompt_tokens} tokens long, but the max_length of this model is "
                f"{defaults.max_length}, the prompt included; set --max-new-tokens"
            )
    return asked or _MAX_NEW_TOKENS


def _rules(config: GenerationConfig, defaults: GenerationDefaults) -> LogitsRules:
    rules = replace(defaults.rules, **said(config, *RULED_BY))
    if config.min_new_tokens == 0:
        rules = replace(rules, min_length=0)
    biases = dict(rules.sequence_bias) | {(each,): bias for each, bias in config.logit_bias.items()}
    return replace(rules, sequence_bias=tuple(biases.items()))
