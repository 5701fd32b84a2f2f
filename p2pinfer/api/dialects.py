"""Paths of the API, and the dialect of each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from .answers import TextSource
from .anthropic import messages
from .anthropic import objects as anthropic
from .errors import ApiError
from .exchange import Plan
from .ollama import answering
from .ollama import objects as ollama
from .openai import objects as openai
from .openai.chat import plan_chat
from .openai.completions import plan_completion
from .openai.responses import plan_response
from .served_model import ServedModel

Planner: TypeAlias = Callable[[bytes, ServedModel], Plan | dict[str, Any]]
Told: TypeAlias = Callable[[Sequence[ServedModel]], dict[str, Any]]
Described: TypeAlias = Callable[[ServedModel], dict[str, Any]]
Asker: TypeAlias = Callable[[bytes, ServedModel, TextSource], Awaitable[dict[str, Any]]]
ErrorBody: TypeAlias = Callable[[ApiError], dict[str, Any]]
MODELS: Final = "/v1/models"
_NO_EMBEDDINGS: Final = (
    "has no embeddings: it is a decoder-only model, which continues texts; ask a server of an embedding model"
)


@dataclass(frozen=True, slots=True)
class Dialect:
    """Endpoints of one dialect, by path.

    Attributes:
        error_body: Shape of its errors.
        generate: Endpoints that generate, POST; a plan is carried out, anything else is the answer.
        tell: Endpoints that tell of the models, GET.
        ask: Endpoints that answer a question without generating, POST.
        model: Shape of a model at /v1/models/NAME; None if there is no such path.
        lacking: Endpoints that a model has nothing for, and why, as the end of a sentence.
    """

    error_body: ErrorBody
    generate: Mapping[str, Planner]
    tell: Mapping[str, Told]
    ask: Mapping[str, Asker] = field(default_factory=dict[str, Asker])
    model: Described | None = None
    lacking: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def paths(self) -> frozenset[str]:
        """All paths, but those of single models."""
        return frozenset((*self.generate, *self.tell, *self.ask))


OPENAI: Final = Dialect(
    openai.error_body,
    {
        "/v1/chat/completions": plan_chat,
        "/v1/completions": plan_completion,
        "/v1/responses": plan_response,
    },
    {MODELS: openai.model_list},
    model=openai.model_object,
    lacking={"/v1/embeddings": _NO_EMBEDDINGS},
)
ANTHROPIC: Final = Dialect(
    anthropic.error_body,
    {"/v1/messages": messages.plan_messages},
    {MODELS: anthropic.model_list},
    {"/v1/messages/count_tokens": messages.count_tokens},
    model=anthropic.model_object,
)
OLLAMA: Final = Dialect(
    ollama.error_body,
    {"/api/chat": answering.plan_chat, "/api/generate": answering.plan_text},
    {"/api/version": ollama.version, "/api/tags": ollama.tags, "/api/ps": ollama.running},
    {"/api/show": ollama.show},
    lacking={"/api/embed": _NO_EMBEDDINGS, "/api/embeddings": _NO_EMBEDDINGS},
)
DIALECTS: Final = (OPENAI, ANTHROPIC, OLLAMA)


def dialect_of(path: str, headers: Mapping[str, str]) -> Dialect:
    """Dialect that answers at `path`; where none does, the one whose client seems to ask.

    OpenAI's and Anthropic's clients list models at the same path; the latter name a version in a header.
    """
    known = [dialect for dialect in DIALECTS if path in dialect.paths]
    if "anthropic-version" in headers and (not known or ANTHROPIC in known):
        return ANTHROPIC
    if known:
        return known[0]
    return OLLAMA if path.startswith("/api/") else OPENAI
