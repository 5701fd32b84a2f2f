"""Source of a model's weights: what every kind of it can do, and the kind that is a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from p2pinfer.models.progress import Progress
from p2pinfer.models.span import BlockSpan

from .checkpoint import Checkpoint, open_checkpoint
from .spec import ModelSpec


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


class FolderSource:
    """A model whose weights are all here: a folder, or a GGUF file."""

    def __init__(
        self, folder: Path, *, cache_dir: Path, progress: Progress | None = None, name: str = ""
    ) -> None:
        if folder.is_file():
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
