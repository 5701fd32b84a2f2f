"""Choice of a model's source: the bundled one, a folder, or the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from p2pinfer.errors import ModelNotFound
from p2pinfer.folders import expand
from p2pinfer.models.pieces.manifest import parse_swarm_name
from p2pinfer.models.progress import Progress
from p2pinfer.text_files import is_text

from .model_source import FolderSource
from .model_source import ModelSource as ModelSource
from .stored_model import open_stored

BUNDLED_MODEL = "tiny-stories"
BUNDLED_DRAFTER = "tiny-stories-drafter"  # guesses that one's tokens

_BUNDLE = Path(__file__).parents[1]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?(@(?!.*\.\.)\w[\w./+-]{0,199})?")


def bundled_drafter_of(folder: Path) -> str:
    """Name of the bundled draft model for the model in `folder`; empty if that is not the bundled one."""
    return BUNDLED_DRAFTER if folder.resolve() == (_BUNDLE / BUNDLED_MODEL).resolve() else ""


def bundled_folder(model: str) -> Path:
    """Folder of a bundled model."""
    return _BUNDLE / model


def resolve_model(
    model: str, *, cache_dir: Path, weights_bytes: int = 0, progress: Progress | None = None
) -> ModelSource:
    """Find the model: `tiny-stories` is the bundled one, and `tiny-stories-drafter` guesses its tokens.

    Then come models named by content (`swarm:REVISION`), folders and GGUF files, then ids of the hub.

    An id may name a branch, a tag or a commit: `owner/name@revision`.

    Args:
        weights_bytes: What all models of the hub together may take in `cache_dir`; 0: whatever is free.

    Raises:
        ModelNotFound: Nothing of that name can be reached.
        CheckpointError: It is there but cannot be used.
    """
    if model in (BUNDLED_MODEL, BUNDLED_DRAFTER):
        return FolderSource(bundled_folder(model), cache_dir=cache_dir, progress=progress, is_open=True)
    if (named := parse_swarm_name(model)) is not None:
        return open_stored(named, cache_dir, progress=progress)
    folder = expand(model)
    if model and folder.is_dir() and not is_text(str(folder.resolve())):
        raise ModelNotFound(
            f"{model}: the path is not UTF-8, so safetensors cannot open it; rename the folder"
        )
    if model and folder.is_dir():
        return FolderSource(folder, cache_dir=cache_dir, progress=progress)
    if model and folder.is_file() and folder.suffix == ".gguf":
        return FolderSource(folder, cache_dir=cache_dir, progress=progress)
    if model and folder.exists():
        raise ModelNotFound(
            f"{model} is a file; name a GGUF file, or the folder that holds config.json and the safetensors"
        )
    if _HUB_ID.fullmatch(model) is None:
        raise ModelNotFound(
            f"there is no folder {model!r}, and it is no id of the Hugging Face hub (owner/name) either"
        )
    from .hub import open_hub  # huggingface_hub's HTTP takes 0.3 s to import, and most runs have a folder

    return open_hub(model, cache_dir=cache_dir, weights_bytes=weights_bytes, progress=progress)
