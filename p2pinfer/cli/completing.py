"""Shell completion of values: files and folders, models, settings, known peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from p2pinfer.errors import P2PInferError


def complete_value(
    metavar: str, ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the value of an option that `--help` calls `metavar`."""
    match metavar:
        case "FILE" | "PEER_OR_FILE":
            return [CompletionItem(incomplete, type="file")]
        case "DIR":
            return [CompletionItem(incomplete, type="dir")]
        case "ID_OR_DIR":
            return [*_those(_models(), incomplete), CompletionItem(incomplete, type="dir")]
        case _:
            return []


def complete_settings(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`KEY=` of every setting."""
    from p2pinfer.api.config import ApiConfig
    from p2pinfer.client_config import (
        AuditConfig,
        ClientConfig,
        GenerationConfig,
        SessionConfig,
        TuneConfig,
        VerifyConfig,
    )
    from p2pinfer.config import SHARED, section_of
    from p2pinfer.models.config import ComputeConfig
    from p2pinfer.node.config import NodeConfig, ServeConfig
    from p2pinfer.node.host_config import HostConfig
    from p2pinfer.node.reach.relay_config import RelayConfig
    from p2pinfer.node.weights.config import WeightsConfig
    from p2pinfer.routing.config import RoutingConfig

    layers: tuple[type[Any], ...] = (
        GenerationConfig,
        ClientConfig,
        SessionConfig,
        RoutingConfig,
        AuditConfig,
        HostConfig,
    )
    layers += (NodeConfig, ComputeConfig, ServeConfig, RelayConfig, WeightsConfig, VerifyConfig)
    layers += (ApiConfig, TuneConfig)
    keys = [f"{section_of(layer)}.{each.name}=" for layer in layers for each in dataclasses.fields(layer)]
    own = [key for key in keys if key.rpartition(".")[2].rstrip("=") not in SHARED]
    return _those([*(f"{name}=" for name in sorted(SHARED)), *own], incomplete)


def complete_peers(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Peer ids of the ledger, by their beginning or their end."""
    from p2pinfer.folders import data_folder
    from p2pinfer.reputation.store import FILE_NAME, open_store

    with suppress(P2PInferError):
        path = data_folder() / FILE_NAME
        if path.is_file():
            store = open_store(path)
            try:
                contents = store.read()
            finally:
                store.close()
            known = [] if contents is None else list(contents.accounts)
            return [
                CompletionItem(peer)
                for peer in known
                if peer.startswith(incomplete) or peer.endswith(incomplete)
            ]
    return []


def _models() -> Iterable[str]:
    """The bundled one, and those that were fetched."""
    from p2pinfer.folders import cache_folder

    yield "tiny-stories"
    with suppress(OSError, P2PInferError):
        yield from (folder.name.replace("--", "/", 1) for folder in Path(cache_folder() / "hub").iterdir())


def _those(words: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]
