"""Model that the API answers with, and the names that requests may call it by."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from p2pinfer.models.checkpoint.spec import ModelSpec

from .config import ApiConfig
from .errors import ApiError

_TAG = ":latest"  # what Ollama's clients put behind a name that has no tag


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model, and the limits of requests."""

    spec: ModelSpec
    config: ApiConfig
    has_template: bool
    created: int = field(default_factory=lambda: int(time.time()))  # when this began, Unix time

    @property
    def id(self) -> str:
        """Name that lists of models show."""
        return self.spec.model

    def check(self, name: str) -> None:
        """Nothing, if `name` is this model's, or the last part of it.

        Raises:
            ApiError: It is not.
        """
        if name.removesuffix(_TAG) not in (self.id, self.id.rpartition("/")[2]):
            raise ApiError(
                f"the model {name[:200]!r} is not served here; this server has {self.id!r}",
                "not_found",
                param="model",
            )

    def max_tokens(self, asked: int | None, name: str) -> int:
        """Tokens of an answer for which so many were asked; all that one may have if none were.

        Raises:
            ApiError: The number makes no sense.
        """
        if asked is not None and asked < 1:
            raise ApiError(f"{name} is {asked}; it must be 1 or more", param=name)
        return min(asked or self.config.max_new_tokens, self.config.max_new_tokens)
