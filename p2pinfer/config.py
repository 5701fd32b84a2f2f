"""Configuration from all sources: default < config.toml < P2PINFER_* < flag.

Each layer keeps its settings in one frozen `XConfig` dataclass, and the defaults live there and nowhere else.
The section of `XConfig` is `[x]`. What several layers need (`SharedConfig`) is set once, at the top of the
file, and reaches every field of that name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

import msgspec

from p2pinfer.models.field_types import describe_type as describe_type
from p2pinfer.models.field_types import is_list, is_table, shown

from . import text_files
from .errors import ConfigError
from .folders import cache_folder, config_folder, data_folder, expand

ENV_PREFIX = "P2PINFER_"
ENV_CONFIG = "P2PINFER_CONFIG"
FILE_NAME = "config.toml"
SECTIONS = (
    "node",
    "host",
    "compute",
    "serve",
    "relay",
    "weights",
    "verify",
    "client",
    "session",
    "routing",
    "audit",
    "generation",
    "tune",
    "api",
)

_Config = TypeVar("_Config")


@dataclass(frozen=True, slots=True)
class SharedConfig:
    """Settings that every command needs, set once for all."""

    # a Hugging Face id, a folder, a GGUF file, swarm:REVISION, or the bundled tiny-stories
    model: str = "tiny-stories"
    bootstrap: tuple[
        str, ...
    ] = ()  # multiaddrs of peers to join the swarm through; empty: bootstrap_peers.txt
    data_dir: Path = field(default_factory=data_folder)  # folder of the identity, the ledger and config.toml
    cache_dir: Path = field(default_factory=cache_folder)  # folder of downloaded models
    weights_bytes: int = 0  # disk limit of downloaded models, bytes; 0: all free space


_MAY_NAME_FILES = ("model", "api.models", "host.allow", "host.deny")
SHARED = frozenset(each.name for each in dataclasses.fields(SharedConfig))


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag as it was given on the command line: `Flag("--listen", ("/ip4/...",))`."""

    name: str
    value: object


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting as it ends up, and who had the last word."""

    key: str  # "serve.max_sessions", or "model" for a shared one
    type: Any
    value: object
    origin: str = "default"


class Settings:
    """The settings of some layers, composed. Made by `load_settings`."""

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        self._settings = settings

    def __getitem__(self, key: str) -> Setting:
        return self._settings[key]

    def __iter__(self) -> Iterator[Setting]:
        return iter(self._settings.values())

    def build(self, config: type[_Config]) -> _Config:
        """The layer's dataclass.

        Raises:
            ConfigError: The layer refuses a combination of values.
        """
        names = [each.name for each in dataclasses.fields(cast(Any, config))]
        try:
            return config(**{name: self[_key(config, name)].value for name in names})
        except ValueError as exc:
            raise ConfigError(f"[{section_of(config)}] {exc}") from exc

    def shared(self) -> dict[str, Any]:
        """The shared settings, by name."""
        return {name: self[name].value for name in sorted(SHARED)}

    def to_toml(self) -> str:
        """A config file that says the same, each line with its origin."""
        lines: list[str] = []
        section = ""
        for setting in self:
            *head, name = setting.key.split(".")
            if head and head[0] != section:
                section = head[0]
                lines += ["", f"[{section}]"]
            written = to_toml(setting.value)
            said = f"{name} = {written}" if written is not None else f"# {name} is not set"
            lines.append(f"{said}  # {setting.origin}")
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """The same for programs: value and origin by key."""
        said = {each.key: {"value": each.value, "origin": each.origin} for each in self}
        return json.dumps(said, default=str) + "\n"


def load_settings(
    *configs: type[Any],
    flags: Mapping[str, Flag] | None = None,
    environ: Mapping[str, str] = os.environ,
    file: Path | None = None,
) -> Settings:
    """Compose the settings of the layers `configs`.

    Sections of other layers are left unread: a mistake there is for the command to report that uses them.

    Args:
        flags: By key, as in `Setting.key`.
        file: The configuration file; None looks where `config_file` says.

    Raises:
        ConfigError: A key that does not exist or a value of the wrong type; the message names both and
            the file, variable or flag.
    """
    flags = flags or {}
    layers: tuple[type[Any], ...] = (SharedConfig, *configs)
    settings = {setting.key: setting for layer in layers for setting in _defaults(layer)}
    said: dict[str, tuple[object, str, bool]] = {}  # key -> value, origin, whether it is text to be read
    path = config_file(flags, environ, file)
    if path is not None:
        for key, value in _read_file(path, settings):
            said[key] = (value, str(path), False)
    for variable, key in _variables(environ, settings):
        said[key] = (environ[variable], f"${variable}", True)
    for key, flag in flags.items():
        said[_known(key, flag.name, settings)] = (flag.value, flag.name, True)
    for key, (value, origin, is_text) in said.items():
        settings[key] = _set(settings[key], value, origin, is_text)
    return Settings(settings)


def config_file(
    flags: Mapping[str, Flag], environ: Mapping[str, str], file: Path | None = None
) -> Path | None:
    """The file to read: the one named, else config.toml in the data directory, else in the config folder.

    Raises:
        ConfigError: A file was named and is not there.
    """
    named = file or (Path(environ[ENV_CONFIG]) if environ.get(ENV_CONFIG) else None)
    if named is not None:
        if not named.is_file():
            raise ConfigError(f"the configuration file {named} does not exist")
        return named
    flag = flags.get("data_dir")
    data_dir = flag.value if flag else environ.get(f"{ENV_PREFIX}DATA_DIR")
    folders = [
        expand(str(data_dir)) if data_dir else SharedConfig().data_dir,
        config_folder(),
    ]
    return next((folder / FILE_NAME for folder in folders if (folder / FILE_NAME).is_file()), None)


def section_of(config: type[Any]) -> str:
    """`ServeConfig` -> "serve"."""
    return config.__name__.removesuffix("Config").lower()


def variable_of(key: str) -> str:
    """`serve.max_sessions` -> "P2PINFER_SERVE__MAX_SESSIONS"."""
    return ENV_PREFIX + key.replace(".", "__").upper()


def environment_without_settings() -> dict[str, str]:
    """Environment of this process less every P2PINFER_*, for a child that is told everything by flags."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}


def _key(config: type[Any], name: str) -> str:
    return name if name in SHARED else f"{section_of(config)}.{name}"


def _defaults(config: type[Any]) -> Iterator[Setting]:
    hints = get_type_hints(config)
    for each in dataclasses.fields(config):
        if each.name in SHARED and config is not SharedConfig:
            continue
        if each.default_factory is not dataclasses.MISSING:
            default: object = each.default_factory()
        else:
            assert each.default is not dataclasses.MISSING, f"{config.__name__}.{each.name} has no default"
            default = each.default
        yield Setting(_key(config, each.name), hints[each.name], default)


def _read_file(path: Path, settings: Mapping[str, Setting]) -> Iterator[tuple[str, object]]:
    try:
        content = tomllib.loads(text_files.read_text(path))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    for name, value in content.items():
        if not isinstance(value, dict):
            yield _known(name, str(path), settings), value
            continue
        if name not in SECTIONS:
            _reject(f"[{name}]", str(path), [f"[{section}]" for section in SECTIONS])
        if any(key.startswith(f"{name}.") for key in settings):
            for key, entry in cast("dict[str, object]", value).items():
                yield _known(f"{name}.{key}", str(path), settings), entry


def _variables(environ: Mapping[str, str], settings: Mapping[str, Setting]) -> Iterator[tuple[str, str]]:
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable == ENV_CONFIG or not value:
            continue
        section, _, name = variable.removeprefix(ENV_PREFIX).lower().rpartition("__")
        if section in SECTIONS and not any(key.startswith(f"{section}.") for key in settings):
            continue
        key = f"{section}.{name}" if section else name
        if key not in settings:
            _reject(variable, "environment", [variable_of(known) for known in settings])
        yield variable, key


def _known(key: str, origin: str, settings: Mapping[str, Setting]) -> str:
    if key not in settings:
        _reject(key, origin, settings)
    return key


def _reject(key: str, origin: str, known: Iterator[str] | Mapping[str, Any] | list[str]) -> None:
    nearest = difflib.get_close_matches(key, list(known), n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "--print-config lists what there is"
    raise ConfigError(f"{origin}: there is no setting {key}; {hint}")


def _set(setting: Setting, value: object, origin: str, is_text: bool) -> Setting:
    _check_text(setting, value, origin)
    if is_text and isinstance(value, str) and (is_list(setting.type) or is_table(setting.type)):
        value = _split(value, setting, origin)
    if is_text and is_table(setting.type):
        value = _assignments(value, setting, origin)
    try:
        converted = msgspec.convert(value, setting.type, strict=not is_text, str_keys=True, dec_hook=_decode)
    except msgspec.ValidationError as exc:
        what = describe_type(setting.type)
        raise ConfigError(f"{origin}: {setting.key} must be {what}, not {shown(value)}") from exc
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ConfigError(f"{origin}: {setting.key} must be a finite number, not {shown(value)}")
    return dataclasses.replace(setting, value=converted, origin=origin)


def _check_text(setting: Setting, value: object, origin: str) -> None:
    """A flag or variable may hold bytes that are no UTF-8; where it names a file, that is as it should be."""
    words = cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,)
    if setting.key in _MAY_NAME_FILES or Path in (setting.type, *get_args(setting.type)):
        return
    if any(isinstance(word, str) and not text_files.is_text(word) for word in words):
        raise ConfigError(f"{origin}: {setting.key} is not UTF-8 text")


def _split(text: str, setting: Setting, origin: str) -> object:
    """A list written in a variable: separated by commas or spaces, or as a TOML array."""
    if not text.lstrip().startswith("["):
        return [part for part in re.split(r"[,\s]+", text) if part]
    try:
        return tomllib.loads(f"list = {text}")["list"]
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{origin}: {setting.key} is not a TOML array: {exc}") from exc


def _assignments(value: object, setting: Setting, origin: str) -> object:
    """A table written as KEY=VALUE, once or several times."""
    table: dict[str, str] = {}
    for part in cast("Sequence[str]", value):
        key, equals, text = part.partition("=")
        if not equals:
            raise ConfigError(
                f"{origin}: {setting.key} must be {describe_type(setting.type)}, not {shown(part)}"
            )
        table[key.strip()] = text.strip()
    return table


def _decode(kind: type[Any], value: object) -> object:
    """Decode what msgspec does not know: paths, written as text."""
    if isinstance(value, str) and issubclass(kind, Path):
        return expand(value)
    raise msgspec.ValidationError(f"{value!r} is no {kind.__name__}")


def to_toml(value: object) -> str | None:
    """A setting's value as TOML; None, which TOML cannot say, stays None."""
    match value:
        case None:
            return None
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case Mapping():
            pairs = cast("Mapping[object, object]", value).items()
            return "{" + ", ".join(f"{json.dumps(str(key))} = {to_toml(each)}" for key, each in pairs) + "}"
        case tuple():
            return "[" + ", ".join(str(to_toml(part)) for part in cast("tuple[object, ...]", value)) + "]"
        case _:
            return json.dumps(str(value), ensure_ascii=False)
