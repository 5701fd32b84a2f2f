"""Keyword arguments of `Client`, `connect` and `generate`, typed, with errors that name the nearest.

Editors complete what a `TypedDict` lists; tests keep both lists equal to what they stand for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypedDict, TypeVar, cast

from p2pinfer.generation.outage import Waiting
from p2pinfer.models.progress import Progress
from p2pinfer.node.transport.identity import Identity
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.routing.config import RoutingConfig

from .client_config import AuditConfig, ClientConfig, SessionConfig
from .events import Report
from .suggestions import suggest

if TYPE_CHECKING:
    from p2pinfer.audit.verifier import Verifier

_P = ParamSpec("_P")
_R = TypeVar("_R")


class GenerationOptions(TypedDict, total=False):
    """Single fields of a `GenerationConfig`."""

    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float | None
    seed: int | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    min_new_tokens: int | None
    logit_bias: Mapping[int, float]
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    show_special: bool


class ClientOptions(TypedDict, total=False):
    """Options that `connect` hands on to `Client`."""

    config: ClientConfig | None
    session_config: SessionConfig | None
    routing_config: RoutingConfig | None
    reputation: Ledger | None
    cache_dir: str | Path | None
    data_dir: str | Path | None
    weights_bytes: int
    progress: Progress | None
    on_wait: Callable[[Waiting], None]
    audit: AuditConfig | None
    verifier: Verifier | None
    on_event: Report | None
    identity: str | Path | Identity | None


def suggesting(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, whose TypeError for a keyword that it does not take says which one is near."""
    signature = inspect.signature(function)
    known = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD) and name != "self"
    ]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        known += ClientOptions.__annotations__

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name in kwargs.keys() - set(known):
            called = function.__qualname__.removesuffix(".__init__")
            raise TypeError(f"{called}() takes no argument {name!r}{suggest(name, known)}")
        return function(*args, **kwargs)

    return call


def addresses_of(bootstrap: str | Sequence[str]) -> tuple[str, ...]:
    """`bootstrap` as addresses; a single one may be given as it is.

    Raises:
        TypeError: It holds something else than text.
    """
    addresses = cast("tuple[object, ...]", (bootstrap,) if isinstance(bootstrap, str) else tuple(bootstrap))
    for address in addresses:
        if not isinstance(address, str):
            raise TypeError(f"bootstrap holds {address!r}; it takes multiaddrs as text")
    return tuple(str(address) for address in addresses)


def check_prompt(prompt: object) -> None:
    """Nothing, if that is one text.

    Raises:
        TypeError: It is several, or none.
    """
    if isinstance(prompt, list | tuple):
        kind = "list" if isinstance(prompt, list) else "tuple"
        raise TypeError(
            f"the prompt is a {kind}; call generate once for each text, or join the messages "
            f"of a chat by the model's template first"
        )
    if not isinstance(prompt, str):
        raise TypeError(f"the prompt is of type {type(prompt).__name__}; it must be a str")
