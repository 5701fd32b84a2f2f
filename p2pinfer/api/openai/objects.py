"""Objects of the OpenAI dialect that several of its endpoints share: errors, models, usage."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

from p2pinfer.api.errors import ApiError, Kind
from p2pinfer.api.exchange import encode
from p2pinfer.api.fields import Unhonoured, bounded
from p2pinfer.api.served_model import ServedModel
from p2pinfer.generation.generation import GenerationResult
from p2pinfer.generation.transcript import FinishReason

SSE: Final = "text/event-stream; charset=utf-8"
PING: Final = b": ping\n\n"
DONE: Final = b"data: [DONE]\n\n"
FINISH: Final[Mapping[FinishReason | None, str]] = {"eos": "stop", "stop": "stop", "length": "length"}
MAX_STOPS: Final = 16
_TYPES: Final[Mapping[Kind, tuple[str, str | None]]] = {  # type and code
    "invalid_request": ("invalid_request_error", None),
    "too_long": ("invalid_request_error", "context_length_exceeded"),
    "authentication": ("invalid_request_error", "invalid_api_key"),
    "forbidden": ("permission_error", "forbidden"),
    "not_found": ("invalid_request_error", "not_found"),
    "busy": ("rate_limit_error", "rate_limit_exceeded"),
    "unavailable": ("server_error", "service_unavailable"),
    "bug": ("server_error", "internal_error"),
}

# Of both endpoints.
UNHONOURED: Final[Mapping[str, Unhonoured]] = {
    "frequency_penalty": Unhonoured("use repetition_penalty", (None, 0)),
    "presence_penalty": Unhonoured("use repetition_penalty", (None, 0)),
    "store": Unhonoured("nothing is kept", (None, False)),
    "service_tier": Unhonoured("there is one", (None, "auto", "default")),
}
HARMLESS: Final = frozenset(
    ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)


def new_id(prefix: str) -> str:
    """Name of one answer."""
    return f"{prefix}-{secrets.token_hex(12)}"


def event(document: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + encode(document) + b"\n\n"


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind, code = _TYPES[error.kind]
    if error.kind == "not_found" and error.param == "model":
        code = "model_not_found"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": code}}


def model_object(model: ServedModel) -> dict[str, Any]:
    """The model as lists show it, with vLLM's names for what OpenAI has none for.

    `max_model_len` is its context, tokens; of an adapter, `parent` is what it tunes and `root` its own name.
    """
    name = model.spec.model
    told: dict[str, Any] = {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": name.partition("/")[0] if "/" in name else "p2pinfer",
        "max_model_len": model.spec.max_positions,
    }
    return told if model.adapter is None else {**told, "root": model.adapter.name, "parent": name}


def model_list(models: Sequence[ServedModel]) -> dict[str, Any]:
    """Body of /v1/models."""
    return {"object": "list", "data": [model_object(model) for model in models]}


def usage(results: Sequence[GenerationResult]) -> dict[str, int]:
    """Tokens of a request; those of the prompt are counted once."""
    prompt = results[0].prompt_tokens
    completion = sum(len(result.token_ids) for result in results)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def logit_bias(said: Mapping[str, float] | None) -> dict[int, float]:
    """Biases by token id.

    Raises:
        ApiError: A name is no token id, or a bias is out of range.
    """
    biases: dict[int, float] = {}
    for name, bias in (said or {}).items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise ApiError(f"logit_bias names {name[:50]!r}, which is no token id", param="logit_bias")
        bounded(bias, "logit_bias", -100, 100)
        biases[int(name)] = bias
    return biases
