"""Writes docs/openapi.json: the HTTP API, of the types that requests are read by. `make docs` runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from p2pinfer.api.anthropic.requests import MessagesRequest
from p2pinfer.api.ollama.objects import ShowRequest
from p2pinfer.api.ollama.requests import ChatRequest as OllamaChatRequest
from p2pinfer.api.ollama.requests import TextRequest as OllamaTextRequest
from p2pinfer.api.openai.chat import ChatRequest
from p2pinfer.api.openai.completions import CompletionRequest
from p2pinfer.api.openai.responses import ResponsesRequest

REQUESTS: dict[str, tuple[type[msgspec.Struct], str]] = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation (OpenAI)."),
    "/v1/completions": (CompletionRequest, "Continue a text (OpenAI)."),
    "/v1/responses": (ResponsesRequest, "Answer a conversation, keeping nothing (OpenAI)."),
    "/v1/messages": (MessagesRequest, "Answer a conversation (Anthropic)."),
    "/v1/messages/count_tokens": (MessagesRequest, "Count the tokens of a conversation (Anthropic)."),
    "/api/chat": (OllamaChatRequest, "Answer a conversation (Ollama)."),
    "/api/generate": (OllamaTextRequest, "Answer or continue a text (Ollama)."),
    "/api/show": (ShowRequest, "Tell of a model (Ollama)."),
}
LISTS = {
    "/v1/models": "List the models (OpenAI; Anthropic, with the header anthropic-version).",
    "/api/tags": "List the models (Ollama).",
    "/api/ps": "List the models as they run (Ollama).",
    "/api/version": "Tell the version of Ollama whose API this is.",
}
_TEMPLATE = "#/components/schemas/{name}"
_ERROR = {"description": "It is not answered; the body says why, in the shape of the dialect."}
_STATUSES = {
    "400": _ERROR,
    "401": _ERROR,
    "403": _ERROR,
    "404": _ERROR,
    "429": _ERROR,
    "503": {"description": "The swarm cannot serve this at the moment."},
}


def openapi() -> str:
    """The description as JSON."""
    types = list(dict.fromkeys(kind for kind, _ in REQUESTS.values()))
    schemas, components = msgspec.json.schema_components(types, ref_template=_TEMPLATE)
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, Any] = {path: _operation("get", said, None) for path, said in LISTS.items()}
    paths |= {path: _operation("post", said, schema_of[kind]) for path, (kind, said) in REQUESTS.items()}
    document = {
        "openapi": "3.1.0",
        "info": {"title": "p2pinfer serve", "version": "1", "license": {"name": "MIT"}},
        "servers": [{"url": "http://127.0.0.1:8000"}],
        "security": [{}, {"bearer": []}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }
    return json.dumps(document, indent=1) + "\n"


def _operation(method: str, said: str, schema: dict[str, Any] | None) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": said, "responses": {"200": {"description": "OK"}, **_STATUSES}}
    if schema is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {method: operation}


if __name__ == "__main__":
    (Path(__file__).parent / "openapi.json").write_text(openapi(), encoding="utf-8")
