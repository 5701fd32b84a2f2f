"""Settings of the HTTP API, apart from the code that goes by them, which imports trio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from p2pinfer.errors import ConfigError
from p2pinfer.models.field_types import check_fields


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """Settings of the HTTP API."""

    # models to answer with, written as `model` is, each by its name; empty: that one; on a node: beside it
    models: tuple[str, ...] = ()
    enabled: bool = False  # on a node: serve it there too; `p2pinfer serve` always does
    host: str = "127.0.0.1"  # address or name to listen on; one that others can reach needs key_file
    port: int = 8000  # TCP port; 0: any that is free
    key_file: Path | None = None  # file of API keys, one per line; not set: no key is asked for
    host_names: tuple[str, ...] = ()  # names that clients reach this by, beside localhost and addresses
    origins: tuple[str, ...] = ()  # web pages that may call this, such as https://chat.example; empty: none
    max_new_tokens: int = 4096  # of one answer, tokens; also where a request names no limit
    max_choices: int = 8  # answers to one request (n)
    max_body_bytes: int = 8 << 20  # of a request, bytes
    max_connections: int = 512  # open at once; more are told to come back
    requests_per_key: int = 64  # requests that generate at once, for each key
    queue_per_key: int = 64  # requests that wait for that, for each key; more are told to come back
    queue_timeout_s: float = 30.0  # how long one waits, seconds
    head_timeout_s: float = 10.0  # for the head of a request, from its first byte, seconds
    body_timeout_s: float = 60.0  # for the body of a request, seconds
    idle_timeout_s: float = 75.0  # for the next request on an open connection, seconds
    write_timeout_s: float = 30.0  # for a client to take a piece of an answer, seconds
    drain_s: float = 10.0  # how long answers may go on when the command is asked to end, seconds

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port is {self.port}; it must be from 0 to 65535")
        for name in (
            "max_new_tokens",
            "max_choices",
            "max_body_bytes",
            "max_connections",
            "requests_per_key",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("queue_per_key", "drain_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be 0 or more")
        for name in (
            "queue_timeout_s",
            "head_timeout_s",
            "body_timeout_s",
            "idle_timeout_s",
            "write_timeout_s",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be above 0")


def check_identity(models: Sequence[str], identity_file: Path | None) -> None:
    """Nothing, unless several models would share a peer id: each has a client, and an id is one client's.

    Raises:
        ConfigError: They would.
    """
    if len(models) > 1 and identity_file is not None:
        raise ConfigError(
            f"a permanent identity (client.identity_file) is one client's, and {len(models)} models need as "
            "many clients; run a `p2pinfer serve` for each model, on a --port of its own"
        )
