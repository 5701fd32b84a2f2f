"""A model that the API answers with, and the names that requests may call it by."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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
    """A model, tuned by an adapter or as it is, and the limits of requests.

    Attributes:
        adapter: One that nodes offer; None: the model as it is.
        created: When this began, Unix time.
    """

    spec: ModelSpec
    config: ApiConfig
    template: ChatTemplate | None = None
    adapter: OfferedAdapter | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def id(self) -> str:
        """Name that lists of models show. An adapter's own name is any text that a stranger may write."""
        return self.spec.model if self.adapter is None else self.adapter.id

    def is_called(self, name: str) -> bool:
        """True if that is the whole name in lists."""
        return name.removesuffix(_TAG) == self.id

    def answers_to(self, name: str) -> bool:
        """True if that is its name, the last part of it, or the adapter's own name."""
        own = self.id.rpartition("/")[2] if self.adapter is None else self.adapter.name
        return name.removesuffix(_TAG) in (self.id, own)

    def check(self, name: str) -> None:
        """Nothing, if the model answers to `name`.

        Raises:
            ApiError: It does not.
        """
        if not self.answers_to(name):
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
