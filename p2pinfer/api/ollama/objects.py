"""Objects of Ollama's dialect: errors, and what it tells of models."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from p2pinfer.api.answers import TextSource
from p2pinfer.api.errors import ApiError
from p2pinfer.api.fields import decode
from p2pinfer.api.served_model import ServedModel

# Clients compare it with the first version that has what they need; this is the one whose API is spoken here.
VERSION: Final = "0.40.0"
_HARMLESS: Final = frozenset(("verbose",))


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in Ollama's shape."""
    return {"error": str(error)}


def time_of(seconds: float) -> str:
    """Unix time as RFC 3339 has it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def version(_: Sequence[ServedModel]) -> dict[str, Any]:
    """Body of /api/version."""
    return {"version": VERSION}


def tags(models: Sequence[ServedModel]) -> dict[str, Any]:
    """Body of /api/tags."""
    return {"models": [{**_listed(model), "modified_at": time_of(model.created)} for model in models]}


def running(models: Sequence[ServedModel]) -> dict[str, Any]:
    """Body of /api/ps: the models are there for as long as the server is."""
    return {"models": [{**_listed(model), **_there(model)} for model in models]}


def _there(model: ServedModel) -> dict[str, Any]:
    never = time_of(model.created + 10 * 365 * 86400)
    return {"expires_at": never, "size_vram": 0, "context_length": model.spec.max_positions}


class ShowRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A request to /api/show."""

    model: str | None = None
    name: str | None = None  # of older clients


async def show(body: bytes, model: ServedModel, _: TextSource) -> dict[str, Any]:
    """Body of /api/show.

    Raises:
        ApiError: Another model is meant.
    """
    said = decode(body, ShowRequest, {}, _HARMLESS)
    model.check(said.model or said.name or "")
    spec = model.spec
    return {
        "license": "",
        "modelfile": "",
        "parameters": "",
        "template": "" if model.template is None else model.template.sources["default"],
        "details": _details(model),
        "model_info": {
            "general.architecture": spec.family,
            "general.parameter_count": _parameters(model),
            f"{spec.family}.block_count": spec.num_blocks,
            f"{spec.family}.context_length": spec.max_positions,
            f"{spec.family}.embedding_length": spec.hidden_size,
            f"{spec.family}.vocab_size": spec.vocab_size,
        },
        "capabilities": ["completion", *(["tools"] if model.takes_tools else [])],
        "modified_at": time_of(model.created),
    }


def _listed(model: ServedModel) -> dict[str, Any]:
    return {
        "name": model.id,
        "model": model.id,
        "size": model.spec.num_blocks * model.spec.block_bytes(),
        "digest": model.spec.revision if model.adapter is None else model.adapter.digest.hex(),
        "details": _details(model),
    }


def _details(model: ServedModel) -> dict[str, Any]:
    return {
        "parent_model": "" if model.adapter is None else model.spec.model,
        "format": "safetensors",
        "family": model.spec.family,
        "families": [model.spec.family],
        "parameter_size": _short(_parameters(model)),
        "quantization_level": model.spec.dtype,
    }


def _parameters(model: ServedModel) -> int:
    """Parameters of the blocks and the embedding, norms and biases left out."""
    return (
        model.spec.num_blocks * model.spec.block_parameters + model.spec.vocab_size * model.spec.hidden_size
    )


def _short(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
