"""Paths of the API, and the dialect of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from . import openai_objects
from .errors import ApiError
from .exchange import Plan
from .openai_chat import plan_chat
from .openai_completions import plan_completion
from .served_model import ServedModel

Planner: TypeAlias = Callable[[bytes, ServedModel], Plan]
Told: TypeAlias = Callable[[ServedModel], dict[str, Any]]
ErrorBody: TypeAlias = Callable[[ApiError], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Dialect:
    """Endpoints of one dialect, by path.

    Attributes:
        error_body: Shape of its errors.
        generate: What generates; POST.
        tell: What is told without generating; GET.
    """

    error_body: ErrorBody
    generate: Mapping[str, Planner]
    tell: Mapping[str, Told]


OPENAI: Final = Dialect(
    openai_objects.error_body,
    {"/v1/chat/completions": plan_chat, "/v1/completions": plan_completion},
    {"/v1/models": openai_objects.model_list},
)
DIALECTS: Final = (OPENAI,)


def dialect_of(path: str) -> Dialect:
    """Dialect that answers at `path`; OpenAI's where none does."""
    return next((each for each in DIALECTS if path in each.generate or path in each.tell), OPENAI)
