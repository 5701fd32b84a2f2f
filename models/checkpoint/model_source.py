"""Source of a model's weights: what every kind of it can do, and the kind that is a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from p2pinfer.models.pieces.manifest import Holdings, Manifest, WeightFile, small_files
from p2pinfer.models.progress import Progress
from p2pinfer.models.span import BlockSpan

from .checkpoint import Checkpoint, open_checkpoint
from .spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Missing:
    """Weight files that are not here, and the folder where they belong."""

    folder: Path
    files: tuple[WeightFile, ...] = ()


class ModelSource(Protocol):
    """A model that is known but perhaps not here yet."""

    @property
    def spec(self) -> ModelSpec:
        """Spec of the model; its revision is known before a weight is."""
        ...

    def fetch(
        self, span: BlockSpan | None, *, embedding_and_head: bool, progress: Progress | None = None
    ) -> Checkpoint:
        """Bring the weights of `span` here; on request also embedding, norm, head and tokenizer.

        Raises:
            CheckpointError: What came is not what was published.
            ModelNotFound: It cannot be had.
            SpanOutOfRange: The model has no such blocks.
        """
        ...

    def fetch_words(self, *, progress: Progress | None = None) -> Path:
        """Bring the tokenizer here, and what is said about it, without any weights; returns their folder.

        Raises:
            ModelNotFound: It cannot be had.
        """
        ...

    def missing_bytes(self, span: BlockSpan | None, *, embedding_and_head: bool) -> int:
        """Bytes that `fetch` would have to bring from elsewhere."""
        ...

    def missing(self, span: BlockSpan | None, *, embedding_and_head: bool) -> Missing:
        """Weight files that `fetch` would have to bring from elsewhere."""
        ...

    def holdings(self) -> Holdings:
        """Files of the model that are here, for peers that may have them. Reads the small ones."""
        ...


class FolderSource:
    """A model whose weights are all here: a folder, or a GGUF file."""

    def __init__(
        self,
        folder: Path,
        *,
        cache_dir: Path,
        progress: Progress | None = None,
        name: str = "",
        is_open: bool = False,
    ) -> None:
        """`is_open` says that anybody may have the model."""
        self._place, self._is_open = folder, is_open
        if folder.is_file():
            self._place = folder.resolve().parent
            from .gguf_model import open_gguf

            path = folder.resolve()
            self._checkpoint = open_gguf(path, name or path.stem, cache_dir=cache_dir, progress=progress)
            return
        self._checkpoint = open_checkpoint(
            folder, name or folder.resolve().name, cache_dir=cache_dir, progress=progress
        )

    @property
    def spec(self) -> ModelSpec:
        return self._checkpoint.spec

    def fetch(
        self, span: BlockSpan | None, *, embedding_and_head: bool, progress: Progress | None = None
    ) -> Checkpoint:
        if span is not None:
            self.spec.check_span(span)
        return self._checkpoint

    def fetch_words(self, *, progress: Progress | None = None) -> Path:
        return self._checkpoint.folder

    def missing_bytes(self, span: BlockSpan | None, *, embedding_and_head: bool) -> int:
        return 0

    def missing(self, span: BlockSpan | None, *, embedding_and_head: bool) -> Missing:
        return Missing(self._place)

    def holdings(self) -> Holdings:
        hashes = self._checkpoint.hashes()
        paths = {name: self._place / name for name in hashes}
        weights = tuple(
            WeightFile(name, paths[name].stat().st_size, sha256) for name, sha256 in sorted(hashes.items())
        )
        folder = self._checkpoint.folder
        spec = self._checkpoint.spec
        return Holdings(
            Manifest(spec.model, spec.numbers, weights, small_files(folder)),
            paths,
            folder,
            is_open=self._is_open,
        )
