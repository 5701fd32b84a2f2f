"""Writes models/configs/family_defaults.json: what transformers' config classes fill in, by family."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from p2pinfer.models.configs.family_rules import RULES, Rules
from p2pinfer.models.configs.values import READ

FILE = Path(__file__).parents[1] / "models" / "configs" / "family_defaults.json"
# Of every family's forward pass, in fields of its class or among a config's other attributes.
EVERY_FAMILY = {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048}
# Sized by the values of a rope's type, and read with it.
OF_ROPES = frozenset({"partial_rotary_factor", "original_max_position_embeddings"})


def defaults_of(family: str, rules: Rules) -> dict[str, Any]:
    """The keys that a family's forward pass reads, and their defaults."""
    config: Any = CONFIG_MAPPING[family]
    found: dict[str, Any] = {**EVERY_FAMILY, **rules.also, **rules.fixed}
    for field in dataclasses.fields(config):
        name = rules.names.get(field.name, field.name)
        if (
            name in READ - OF_ROPES - rules.fixed.keys()
            and field.name not in rules.unread | rules.refused.keys()
        ):
            found[name] = None if field.default is dataclasses.MISSING else field.default
    if rules.rope == "one":
        found["rope_theta"] = config.default_theta
    if rules.rope == "by kind" and isinstance(config.default_theta, dict):
        found["rope_theta"] = config.default_theta["global"]
    elif rules.rope == "by kind":
        found["rope_theta"] = config.default_theta
    if rules.period_key:
        found.setdefault(rules.period_key, None)
    return dict(sorted(found.items()))


def defaults() -> str:
    """The whole file."""
    table = {family: defaults_of(family, rules) for family, rules in sorted(RULES.items())}
    lines = [f"  {json.dumps(family)}: {json.dumps(values)}" for family, values in table.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(defaults(), encoding="utf-8")
