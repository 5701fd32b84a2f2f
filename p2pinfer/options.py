"""Keyword arguments of `Client`, `connect` and `generate`, typed, with errors that name the nearest.

Editors complete what a `TypedDict` lists; tests keep both lists equal to what they stand for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypedDict, TypeVar, cast

import trio

from p2pinfer.generation.outage import Waiting
from p2pinfer.models.field_types import shown
from p2pinfer.models.progress import Progress
from p2pinfer.models.text.chat_template import ChatPrompt
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.transport.identity import Identity
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.routing.config import RoutingConfig
from p2pinfer.routing.policy import RoutingPolicy

from .client_config import AuditConfig, ClientConfig, GenerationConfig, SessionConfig
from .errors import LocalError
from .events import Report
from .suggestions import suggest

if TYPE_CHECKING:
    from p2pinfer.audit.verifier import Verifier

_KINDS: Final[Mapping[str, tuple[type[Any], ...]]] = {
    "model": (str, Path),
    "policy": (str, RoutingPolicy),
    "config": (ClientConfig,),
    "host_config": (HostConfig,),
    "session_config": (SessionConfig,),
    "routing_config": (RoutingConfig,),
    "reputation": (Ledger,),
    "cache_dir": (str, Path),
    "data_dir": (str, Path),
    "weights_bytes": (int,),
    "on_wait": (),  # any function
    "audit": (AuditConfig,),
    "identity": (str, Path, Identity),
    "on_event": (),
    "generation_config": (GenerationConfig,),
    "token": (str,),
}
_NEVER_NONE: Final = frozenset({"model", "weights_bytes", "on_wait", "token"})

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
    grammar: str | None
    logprobs: int | None


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
    """`function`, whose TypeError for a wrong keyword names the nearest, for a wrong type what it takes."""
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
        check_arguments(**{name: value for name, value in kwargs.items() if name in _KINDS})
        return function(*args, **kwargs)

    return call


def check_arguments(**given: object) -> None:
    """Nothing, if each of these arguments of `Client` and `generate` is of a type that it may have.

    None is right for all that have a default of their own.

    Raises:
        TypeError: One is not; the message names it, and what it takes.
    """
    for name, value in given.items():
        kinds = _KINDS[name]
        if value is None and name not in _NEVER_NONE:
            continue
        if isinstance(value, kinds) or (not kinds and callable(value)):
            continue
        said = shown(value)  # before it is narrowed
        if not kinds:
            raise TypeError(f"{name} is {said}; it takes a function")
        takes = " or ".join(kind.__name__ for kind in kinds)
        made = (
            ", and this is a class: call it" if isinstance(value, type) and issubclass(value, kinds) else ""
        )
        raise TypeError(f"{name.removeprefix('generation_')} is {said}; it takes {takes}{made}")


def addresses_of(bootstrap: str | Sequence[str]) -> tuple[str, ...]:
    """`bootstrap` as addresses; a single one may be given as it is.

    Raises:
        TypeError: It holds something else than text.
    """
    if not isinstance(cast("object", bootstrap), Iterable):
        raise TypeError(f"bootstrap is {shown(bootstrap)}; it takes multiaddrs as text")
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
            f"the prompt is a {kind}; call generate once for each text, or give it what "
            f"client.chat_template.render(messages) makes of a chat"
        )
    if not isinstance(prompt, str | ChatPrompt):
        raise TypeError(f"the prompt is of type {type(prompt).__name__}; it must be a str")


def check_loop() -> None:
    """Nothing within a trio loop; LocalError in another one."""
    if not trio.lowlevel.in_trio_run():
        raise LocalError(
            "Client needs trio, and this is another loop, such as asyncio's or a notebook's: "
            "use trio.run, or p2pinfer.connect_asyncio() there, or p2pinfer.connect(), which needs no loop"
        )
