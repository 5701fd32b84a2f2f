"""Spec of a model from what describes it: a config, the header of a GGUF file, or the hub's listing.

No weight is read, hashed or fetched, so the spec has no revision that another peer's could be compared with.
"""

from __future__ import annotations

from pathlib import Path

from p2pinfer.errors import ModelNotFound
from p2pinfer.folders import expand
from p2pinfer.models.checkpoint.gguf_model import describe_gguf
from p2pinfer.models.checkpoint.source import BUNDLED_DRAFTER, BUNDLED_MODEL, bundled_folder, resolve_model
from p2pinfer.models.checkpoint.spec import ModelSpec, model_spec, read_config
from p2pinfer.models.configs.published_sizes import published_shape


def describe_model(model: str, *, cache_dir: Path) -> ModelSpec:
    """Spec of a bundled model, of a folder that has a config.json, of a GGUF file, or of a model at the hub.

    Where the hub does not answer, or keeps the model from us, sizes that are known here serve.

    Raises:
        ModelNotFound: Nothing of that name can be reached.
        CheckpointError: It is there but cannot be used.
    """
    path = bundled_folder(model) if model in (BUNDLED_MODEL, BUNDLED_DRAFTER) else expand(model)
    if model and path.is_dir():
        return model_spec(path.resolve().name, read_config(path), {})
    if model and path.is_file() and path.suffix == ".gguf":
        return describe_gguf(path.resolve(), path.stem)
    if model and path.is_file() and path.name == "config.json":
        return model_spec(path.resolve().parent.name, read_config(path.parent), {})
    try:
        return resolve_model(model, cache_dir=cache_dir).spec
    except ModelNotFound:
        if (shape := published_shape(model)) is None:
            raise
        return model_spec(shape.model, shape.config(), {})
