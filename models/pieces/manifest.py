"""Contents of a model, by content address: its weight files, its config, and its small files.

A revision is a hash of the names and SHA-256 of all weight files, and of what the config says about the
forward pass. So whoever has a revision can check everything that says it is that model, from wherever it
comes: a list of hashes, then each file by its hash. Tokenizers are no part of it, since a node that computes
blocks needs none. They have an address of their own, which a swarm name may add.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from blake3 import blake3

from p2pinfer.errors import CheckpointError
from p2pinfer.models.configs.numbers import numbers_of, revision_digest, weights_digest

CONFIG: Final = "config.json"
INDEX_FILE: Final = "model.safetensors.index.json"
# What says how text becomes tokens, which of them end it, and how one draws them.
WORDS: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
MAX_SHARDS: Final = 4096
MAX_FILE_BYTES: Final = 1 << 40  # of a weight file
MAX_TEXT_BYTES: Final = 64 << 20  # of a small file; the largest tokenizers have 35 MB
MAX_NUMBERS: Final = 1 << 16  # characters
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}\.(?:safetensors|gguf)")
_SWARM_NAME: Final = re.compile(r"swarm:([0-9a-f]{32})(?:-([0-9a-f]{32}))?")


@dataclass(frozen=True, slots=True)
class SwarmName:
    """A model named by content: `swarm:REVISION`, or `swarm:REVISION-WORDS` with its tokenizer's files."""

    revision: str
    words: str = ""

    def __str__(self) -> str:
        return f"swarm:{self.revision}" + (f"-{self.words}" if self.words else "")


def parse_swarm_name(model: str) -> SwarmName | None:
    """The name, or None where `model` is none of that kind."""
    found = _SWARM_NAME.fullmatch(model)
    return SwarmName(found[1], found[2] or "") if found else None


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A weight file. Its hash is part of the revision, and its size is what whoever lists it says."""

    name: str
    size: int
    sha256: str  # in hex


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A small file: the config, an index, or one of the tokenizer's."""

    name: str
    size: int
    digest: str  # blake3, in hex


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that a model consists of."""

    model: str  # for people
    numbers: str
    weights: tuple[WeightFile, ...]
    texts: tuple[SmallFile, ...]

    @property
    def revision(self) -> str:
        """The content address of weights and numbers."""
        hashes = {each.name: each.sha256 for each in self.weights}
        return revision_digest(weights_digest(hashes), self.numbers)

    @property
    def words(self) -> str:
        """The content address of the files that concern text; empty where there are none."""
        return words_digest(self.texts)

    @property
    def is_gguf(self) -> bool:
        """True if the weights are GGUF files."""
        return any(each.name.endswith(".gguf") for each in self.weights)

    def check(self) -> None:
        """Nothing, if names and sizes can be those of a model's files.

        Raises:
            CheckpointError: They cannot.
        """
        if not 1 <= len(self.weights) <= MAX_SHARDS or len(self.numbers) > MAX_NUMBERS:
            raise CheckpointError("no weight files, or too many")
        kinds = {each.name.rpartition(".")[2] for each in self.weights}
        if len(kinds) != 1 or len({each.name for each in self.weights}) != len(self.weights):
            raise CheckpointError("weight files of two kinds, or one of them twice")
        for weight in self.weights:
            # A path here could name any file of the machine, so only plain names pass.
            if _FILE_NAME.fullmatch(weight.name) is None or not 0 < weight.size <= MAX_FILE_BYTES:
                raise CheckpointError(f"{weight.name!r:.80} of {weight.size} bytes is no weight file")
        names = [text.name for text in self.texts]
        if not {*names} <= {CONFIG, INDEX_FILE, *WORDS} or len({*names}) != len(names):
            raise CheckpointError("small files that belong to no model")
        for text in self.texts:
            if not 0 <= text.size <= MAX_TEXT_BYTES:
                raise CheckpointError(f"{text.name} of {text.size} bytes")

    def check_config(self, content: bytes) -> dict[str, Any]:
        """The config in `content`, if it is that of this revision.

        Raises:
            CheckpointError: It is no config, or another one.
        """
        try:
            config = json.loads(content)
        except (ValueError, RecursionError) as exc:
            raise CheckpointError(f"the config is no JSON: {exc}") from exc
        if not isinstance(config, dict) or numbers_of(cast("dict[str, Any]", config)) != self.numbers:
            raise CheckpointError("the config is not that of this revision")
        return cast("dict[str, Any]", config)


@dataclass(frozen=True, slots=True)
class Holdings:
    """A model as far as it is on this disk."""

    manifest: Manifest
    paths: Mapping[str, Path]  # of the weight files that are here, by name
    folder: Path  # of the small files
    is_open: bool = False  # where it came from, anybody may have it without a password
    extra: Mapping[str, Path] = field(default_factory=dict[str, Path])  # small files that lie elsewhere


def words_digest(texts: tuple[SmallFile, ...]) -> str:
    """32 hex digits of blake3 over names and digests of the files that concern text; empty without any."""
    lines = [f"{each.name} {each.digest}" for each in sorted(texts, key=lambda text: text.name)]
    said = [line for line in lines if line.split()[0] in WORDS]
    return blake3("\n".join(said).encode()).hexdigest()[:32] if said else ""


def small_files(folder: Path) -> tuple[SmallFile, ...]:
    """The small files of a model folder, hashed. Files that cannot be read are left out."""
    found: list[SmallFile] = []
    for name in (CONFIG, INDEX_FILE, *WORDS):
        try:
            content = (folder / name).read_bytes()
        except OSError:
            continue
        if len(content) <= MAX_TEXT_BYTES:
            found.append(SmallFile(name, len(content), blake3(content).hexdigest()))
    return tuple(found)
