"""Model that the API answers with, and the names that requests may call it by."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.text.chat_template import ChatTemplate
from p2pinfer.routing.announcement import OfferedAdapter

from .config import ApiConfig
from .errors import ApiError
from .tool_calls import Toolbox, fault_of, style_of

_TAG = ":latest"  # what Ollama's clients put behind a name that has no tag


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model, and the limits of requests."""

    spec: ModelSpec
    config: ApiConfig
    template: ChatTemplate | None = None
    adapters: Callable[[], Sequence[OfferedAdapter]] = tuple  # that nodes offer at the moment
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
        is_own = name.removesuffix(_TAG) in (self.id, self.id.rpartition("/")[2])
        if not is_own and any(name in (each.id, each.name) for each in self.adapters()):
            raise ApiError(
                f"{name[:200]!r} is an adapter that nodes offer; this server answers with {self.id!r} alone: "
                "`p2pinfer generate --adapter` takes it",
                "not_found",
                param="model",
            )
        if not is_own:
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

    @property
    def takes_tools(self) -> bool:
        """True if the model can be given tools, and its calls can be read."""
        return style_of(self.template) is not None

    def knows(self, variable: str) -> bool:
        """True if the chat template has a variable of that name."""
        return self.template is not None and any(variable in each for each in self.template.sources.values())

    def toolbox(self, schemas: Sequence[Mapping[str, Any]], *, single: bool = False) -> Toolbox | None:
        """Tools for an answer; None if there are none.

        Args:
            single: The answer ends with its first call.

        Raises:
            ApiError: The model takes none, or one has a fault.
        """
        if not schemas:
            return None
        if self.template is None:
            raise ApiError("tools are not supported: this model has no chat template", param="tools")
        if (style := style_of(self.template)) is None:
            raise ApiError(
                "tools are not supported: this model's chat template has none, or in a form whose calls are "
                "not read here",
                param="tools",
            )
        if fault := fault_of(schemas):
            raise ApiError(f"a tool {fault}", param="tools")
        return Toolbox(tuple(schemas), style, single)

    def thinking(self, wanted: bool | None, name: str) -> dict[str, Any]:
        """Variables of the chat template that switch thinking on or off.

        Raises:
            ApiError: It is wanted, and the template has no such switch.
        """
        if wanted is None or (not wanted and not self.knows("enable_thinking")):
            return {}
        if not self.knows("enable_thinking"):
            raise ApiError(
                f"{name} is not supported: this model's chat template has no switch for it", param=name
            )
        return {"enable_thinking": wanted}
