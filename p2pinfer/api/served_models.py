"""Models of one server, and which of them a request means.

An adapter that nodes offer for a model is one more name for it: what a request with that name generates is
tuned by the adapter. It is fetched when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import trio

from p2pinfer.errors import ConfigError
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.recent import Recent
from p2pinfer.routing.announcement import OfferedAdapter
from p2pinfer.session.terms import SessionAdapter

from .answers import TextSource
from .config import ApiConfig
from .errors import ApiError
from .served_model import ServedModel

_KEPT: Final = 4  # adapters, of tens of megabytes each


@dataclass(frozen=True, slots=True)
class Served:
    """A model, and what generates its texts."""

    model: ServedModel
    source: TextSource


class _Named(msgspec.Struct):
    """Names of a model in a request of any dialect."""

    model: str | None = None
    name: str | None = None  # of Ollama's older clients


class ServedModels:
    """Models of one server, in the order in which lists show them."""

    def __init__(
        self,
        sources: Sequence[TextSource],
        config: ApiConfig,
        adapters: Callable[[ModelSpec], Sequence[OfferedAdapter]],
    ) -> None:
        """Models of these sources, of which there is one at least.

        Args:
            adapters: That nodes offer for a model at the moment.

        Raises:
            ConfigError: Two have the same name, so that no request could tell them apart.
        """
        self._adapters = adapters
        self._loaded: Recent[bytes, SessionAdapter] = Recent(_KEPT)
        self._loading = trio.Lock()
        self._served = tuple(
            Served(ServedModel(each.spec, config, each.chat_template), each) for each in sources
        )
        names = [each.spec.model for each in sources]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(
                f"two of the models are called {min(twice)!r}: serve one of them, or rename its folder"
            )

    @property
    def models(self) -> list[ServedModel]:
        """The models as they are."""
        return [each.model for each in self._served]

    @property
    def listed(self) -> list[ServedModel]:
        """Each model, and behind it the adapters for it."""
        found: list[ServedModel] = []
        for each in self._served:
            found += [each.model, *(tuned.model for tuned in self._tuned(each))]
        return found

    def asked(self, body: bytes) -> Served:
        """The model that the body of a request names.

        Where it names none, the first one: whoever reads all of the body says what is wrong with it.

        Raises:
            ApiError: It names one that is not served here.
        """
        try:
            said = msgspec.json.decode(body, type=_Named)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return self._served[0]
        name = said.name if said.model is None else said.model
        return self._served[0] if name is None else self.named(name)

    def named(self, name: str) -> Served:
        """The model that answers to a name. A whole one goes before a part, and a model before an adapter.

        Raises:
            ApiError: There is none, or there are several.
        """
        found = _called(self._served, name) or _called(
            [tuned for each in self._served for tuned in self._tuned(each)], name
        )
        if len(found) == 1:
            return found[0]
        if found:
            listed = " or ".join(repr(each.model.id) for each in found)
            raise ApiError(f"the model {name[:200]!r} can be {listed}", "not_found", param="model")
        listed = ", ".join(repr(each.model.id) for each in self._served)
        raise ApiError(
            f"the model {name[:200]!r} is not served here; this server has {listed}",
            "not_found",
            param="model",
        )

    async def adapter_of(self, served: Served) -> SessionAdapter | None:
        """The adapter that tunes it, fetched from a node that offers it unless it is here.

        Raises:
            ConfigError: Nobody offers it any more, or this client holds no weights to apply it to.
            PeerError: Nobody hands it out.
        """
        if (offer := served.model.adapter) is None:
            return None
        async with self._loading:  # or several requests would fetch it at once
            if offer.digest not in self._loaded:
                self._loaded[offer.digest] = await served.source.load_adapter(offer.id)
            return self._loaded[offer.digest]

    def _tuned(self, served: Served) -> list[Served]:
        offers = self._adapters(served.model.spec)
        return [Served(replace(served.model, adapter=each), served.source) for each in offers]


def _called(served: Sequence[Served], name: str) -> list[Served]:
    whole = [each for each in served if each.model.is_called(name)]
    return whole or [each for each in served if each.model.answers_to(name)]
