"""Writes docs/configuration.md from the layers' dataclasses: their defaults, and the comments beside them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from pathlib import Path
from typing import Any, get_type_hints

from p2pinfer.api.config import ApiConfig
from p2pinfer.client import ClientConfig
from p2pinfer.client_config import AuditConfig, SessionConfig, TuneConfig
from p2pinfer.config import SHARED, SharedConfig, describe_type, section_of, to_toml, variable_of
from p2pinfer.generation.generation import GenerationConfig
from p2pinfer.idle_audits import VerifyConfig
from p2pinfer.models.config import ComputeConfig
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.node import NodeConfig
from p2pinfer.node.reach.relay_config import RelayConfig
from p2pinfer.node.weights.config import WeightsConfig
from p2pinfer.routing.config import RoutingConfig

LAYERS = (
    (NodeConfig, "node"),
    (HostConfig, "node, generate, swarm, tune"),
    (ComputeConfig, "node"),
    (ServeConfig, "node"),
    (RelayConfig, "node"),
    (WeightsConfig, "node, models"),
    (VerifyConfig, "node"),
    (GenerationConfig, "generate"),
    (ApiConfig, "serve, node --serve"),
    (ClientConfig, "generate, serve, swarm, tune"),
    (SessionConfig, "generate, serve"),
    (RoutingConfig, "generate, serve, tune"),
    (AuditConfig, "generate, serve, node --verify"),
    (TuneConfig, "tune"),
)

INTRODUCTION = """\
# Configuration

Each setting has four sources. A later source in this list overrides an earlier one: the default,
`config.toml`, the environment, and flags. `p2pinfer COMMAND --print-config` prints the effective settings
and the source of each. Its output is a valid `config.toml`.

- The file is the one given by `--config` or `$P2PINFER_CONFIG`. Otherwise it is `config.toml` in the data
  directory, or else in the user's configuration folder (on Linux `~/.config/p2pinfer`).
- The environment variable of `max_sessions` in `[serve]` is `P2PINFER_SERVE__MAX_SESSIONS`. That of `model`
  is `P2PINFER_MODEL`. Separate list items by commas or spaces, or write a TOML array. An empty variable is
  ignored.
- Settings that have no flag are set by `--set`, for example `--set serve.max_sessions=8`.

An unknown key or a value of the wrong type ends the command with an error that names it. Each command reads
only the sections that it uses. `make docs` writes this file.
"""


def comments(config: type[Any]) -> dict[str, str]:
    """Comments of each field, by name: on any line of the field's, and on lines of their own above it."""
    source = textwrap.dedent(inspect.getsource(config))
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    said: dict[str, str] = {}
    behind = definition.lineno  # the last line of the statement before
    for statement in definition.body:
        stop = statement.end_lineno or statement.lineno
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            lines = range(behind + 1, stop + 1)
            said[statement.target.id] = " ".join(by_line[line] for line in lines if line in by_line)
        behind = stop
    return said


def default_of(name: str, value: object) -> str:
    """A default as one would write it. Folders depend on the system, so they are described."""
    if name in ("data_dir", "cache_dir"):
        return "depends on the system"
    written = to_toml(value)
    return "not set" if written is None else f"`{written}`"


def table(config: type[Any]) -> list[str]:
    """One row per setting of a layer; what is shared has a table of its own."""
    said, hints, defaults = comments(config), get_type_hints(config), config()
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(config):
        if field.name not in SHARED or config is SharedConfig:
            kind = describe_type(hints[field.name])
            default = default_of(field.name, getattr(defaults, field.name))
            rows.append(f"| `{field.name}` | {kind} | {default} | {said[field.name]} |")
    return rows


def configuration() -> str:
    """The whole of docs/configuration.md."""
    parts = [INTRODUCTION, "## For every command", "", *table(SharedConfig)]
    for config, commands in LAYERS:
        title = f"## [{section_of(config)}]"
        doc = (inspect.getdoc(config) or "").splitlines()[0]
        parts += [
            "",
            title,
            "",
            f"{doc} Read by {commands}; variables begin with `{variable_of(section_of(config))}__`.",
            "",
            *table(config),
        ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(configuration(), encoding="utf-8")
