"""Config keys that are refused, since they would change the forward pass in ways not implemented.

Without these refusals such a model would run and give other numbers than it should. A key that transformers
ignores as well is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from p2pinfer.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class NotComputed:
    """A key, what makes it harmless, and what it does otherwise."""

    harmless: tuple[Any, ...]
    why: str


NOT_COMPUTED: Final[Mapping[str, NotComputed]] = {
    "partial_rotary_factor": NotComputed((None, 1), "rotary embeddings would cover only part of each head"),
    "per_layer_config": NotComputed((None, {}), "its blocks would have different shapes"),
    "use_bidirectional_attention": NotComputed((None, False), "tokens would attend to later tokens"),
    "is_causal": NotComputed((True,), "tokens would attend to later tokens"),
    "is_encoder_decoder": NotComputed((None, False), "a separate encoder would read the prompt"),
    "attention_chunk_size": NotComputed(
        (None,), "transformers would cut the cache, and not the prompt, by it"
    ),
    "kv_sharing_modes": NotComputed((None,), "blocks would share their KV caches"),
}
_NONE: Final[Mapping[str, NotComputed]] = {}
# Checked with the rope, whose type decides.
_OF_ROPE: Final = frozenset({"partial_rotary_factor"})


def check_all_computed(
    model: str, config: Mapping[str, Any], of_family: Mapping[str, NotComputed] = _NONE
) -> None:
    """Nothing, if the config sets no key that is not computed, those of the rope left out.

    Args:
        model: The name for people.
        config: config.json as it is.
        of_family: Further keys, which only this family has.

    Raises:
        CheckpointError: It does; the sentence says which and what the key would do.
    """
    for key in NOT_COMPUTED:
        if key not in _OF_ROPE:
            check_computed(model, key, config)
    for key, refused in of_family.items():
        if key in config and config[key] not in refused.harmless:
            raise refusal(model, key, refused.why)


def check_computed(model: str, key: str, values: Mapping[str, Any]) -> None:
    """Nothing, if `values` sets the one key to nothing but what is harmless, or not at all.

    Raises:
        CheckpointError: It is set to something else.
    """
    if key in values and values[key] not in NOT_COMPUTED[key].harmless:
        raise refusal(model, key, NOT_COMPUTED[key].why)


def refusal(model: str, key: str, why: str) -> CheckpointError:
    """The error for a key that is not computed."""
    return CheckpointError(f"{model} sets {key}, which p2pinfer does not support: {why}")
