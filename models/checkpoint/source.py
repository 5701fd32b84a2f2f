"""Sources of a model: the bundled one, a folder, or the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

from p2pinfer.errors import ModelNotFound
from p2pinfer.folders import expand
from p2pinfer.models.progress import Progress
from p2pinfer.models.span import BlockSpan
from p2pinfer.text_files import is_text

from .checkpoint import Checkpoint, open_checkpoint
from .spec import ModelSpec

BUNDLED_MODEL = "tiny-stories"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?(@(?!.*\.\.)\w[\w./+-]{0,199})?")


class ModelSource(Protocol):
    """A model that is known but perhaps not here yet."""

    @property
    def spec(self) -> ModelSpec:
        """Spec of the model; its revision is known before a weight is."""
        ...

    def fetch(
        self, span: BlockSpan | None, *, embedding_and_head: bool, progress: Progress | None = None
    ) -> Checkpoint:
        """Bring the weights of `span` here; with `ends` also embedding, norm, head and tokenizer.

        Raises:
            CheckpointError: What came is not what was published.
            ModelNotFound: It cannot be had.
            SpanOutOfRange: The model has no such blocks.
        """
        ...

    def missing_bytes(self, span: BlockSpan | None, *, embedding_and_head: bool) -> int:
        """Bytes that `fetch` would have to bring from elsewhere."""
        ...


def resolve_model(
    model: str, *, cache_dir: Path, weights_bytes: int = 0, progress: Progress | None = None
) -> ModelSource:
    """Find the model: `tiny-stories` is the bundled one, then come folders, then ids of the hub.

    An id may name a branch, a tag or a commit: `owner/name@revision`.

    Args:
        weights_bytes: What all models of the hub together may take in `cache_dir`; 0: whatever is free.

    Raises:
        ModelNotFound: Nothing of that name can be reached.
        CheckpointError: It is there but cannot be used.
    """
    if model == BUNDLED_MODEL:
        return FolderSource(Path(__file__).parents[1] / BUNDLED_MODEL, cache_dir=cache_dir, progress=progress)
    folder = expand(model)
    if model and folder.is_dir() and not is_text(str(folder.resolve())):
        raise ModelNotFound(
            f"{model}: the path is not UTF-8, so safetensors cannot open it; rename the folder"
        )
    if model and folder.is_dir():
        return FolderSource(folder, cache_dir=cache_dir, progress=progress)
    if model and folder.exists():
        raise ModelNotFound(f"{model} is a file; name the folder that holds config.json and the safetensors")
    if _HUB_ID.fullmatch(model) is None:
        raise ModelNotFound(
            f"there is no folder {model!r}, and it is no id of the Hugging Face hub (owner/name) either"
        )
    from .hub import open_hub  # huggingface_hub's HTTP takes 0.3 s to import, and most runs have a folder

    return open_hub(model, cache_dir=cache_dir, weights_bytes=weights_bytes, progress=progress)


class FolderSource:
    """A model whose weights are all here."""

    def __init__(
        self, folder: Path, *, cache_dir: Path, progress: Progress | None = None, name: str = ""
    ) -> None:
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

    def missing_bytes(self, span: BlockSpan | None, *, embedding_and_head: bool) -> int:
        return 0
