"""HTTP API and page in front of clients: what `p2pinfer serve` runs, and `p2pinfer node --serve`."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from p2pinfer.api.app import App
from p2pinfer.api.config import ApiConfig, check_identity
from p2pinfer.api.http_server import serve_http
from p2pinfer.client import Client
from p2pinfer.client_config import AuditConfig, ClientConfig
from p2pinfer.config import SharedConfig
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.node.concurrency.nurseries import open_nursery, outlasting
from p2pinfer.node.events import Event, Ready
from p2pinfer.node.host_config import HostConfig, dialling_only
from p2pinfer.routing.announcement import OfferedAdapter
from p2pinfer.served import offered_adapters
from p2pinfer.web.feed import Feed
from p2pinfer.web.site import Site

Told = Callable[[Sequence[str], list[str]], None]  # the models, and URLs


async def serve_door(
    clients: Sequence[Client], site: Site, config: ApiConfig, keys: tuple[str, ...], tell: Told
) -> None:
    """Serve until cancelled.

    Args:
        clients: Open ones, one for each model, whose swarms the page shows by `site`.
        tell: Called once it serves.

    Raises:
        AddressUnusable: The address is taken, or not of this machine.
        ConfigError: Two of the models have one name.
    """
    members = {client.spec.model: client.member for client in clients}

    def offers(spec: ModelSpec) -> list[OfferedAdapter]:
        return offered_adapters(members[spec.model].announcements(spec.revision))

    app = App(clients, config, keys, site, offers)
    async with open_nursery() as nursery:
        nursery.start_soon(app.warm_up)
        addresses = await nursery.start(serve_http, app.handle, config)
        urls = [f"http://{f'[{host}]' if ':' in host else host}:{port}" for host, port in addresses]
        tell([client.spec.model for client in clients], urls)
        await trio.sleep_forever()


def serving_line(event: str, models: Sequence[str], urls: list[str]) -> str:
    """Event of a server that is ready, as --json prints it."""
    return json.dumps({"event": event, "urls": urls, "model": models[0], "models": models}) + "\n"


class NodeDoor:
    """The API and the page at a node, by clients of its own that join the swarm through the node.

    Args:
        open_client: Given a model, the node's addresses and the feed, opens a client.
        models: That it answers with.
        data_dir: Of the node, where runs of `tune` are kept too.
    """

    def __init__(
        self,
        open_client: Callable[[str, Ready, Feed], AbstractAsyncContextManager[Client]],
        models: Sequence[str],
        config: ApiConfig,
        keys: tuple[str, ...],
        data_dir: Path,
        tell: Told,
    ) -> None:
        self._open_client = open_client
        self._models = models
        self._data_dir = data_dir
        self._config = config
        self._keys = keys
        self._tell = tell
        self._node: Ready | None = None
        self._is_ready = trio.Event()

    def note(self, event: Event) -> None:
        """Take in what the node does."""
        if isinstance(event, Ready) and self._node is None:
            self._node = event
            self._is_ready.set()

    async def serve(self) -> None:
        """Serve until cancelled, from when the node serves."""
        await self._is_ready.wait()
        assert self._node is not None
        feed = Feed()
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(outlasting(self._open_client(model, self._node, feed)))
                for model in self._models
            ]
            await serve_door(
                clients, Site(clients, feed, self._data_dir), self._config, self._keys, self._tell
            )


def node_door(
    config: ApiConfig,
    keys: tuple[str, ...],
    shared: SharedConfig,
    host_config: HostConfig,
    client_config: ClientConfig,
    audit_config: AuditConfig,
    tell: Told,
) -> NodeDoor:
    """The door of a node with these settings. What its clients learn goes to the ledger in `data_dir`.

    Raises:
        ConfigError: It has several models and one identity.
    """
    models = tuple(dict.fromkeys((shared.model, *config.models)))
    check_identity(models, client_config.identity_file)

    @asynccontextmanager
    async def open_client(model: str, node: Ready, feed: Feed) -> AsyncGenerator[Client]:
        async with Client(
            model=model,
            config=client_config,
            bootstrap=(*node.addrs, *shared.bootstrap),
            host_config=dialling_only(host_config),
            cache_dir=shared.cache_dir,
            data_dir=shared.data_dir,
            weights_bytes=shared.weights_bytes,
            audit=replace(audit_config, own_peers=(*audit_config.own_peers, node.peer_id)),
            on_event=feed.report,
        ) as client:
            yield client

    return NodeDoor(open_client, models, config, keys, shared.data_dir, tell)
