"""HTTP API and page in front of a client: what `p2pinfer serve` runs, and `p2pinfer node --serve`."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from p2pinfer.api.app import App
from p2pinfer.api.config import ApiConfig
from p2pinfer.api.http_server import serve_http
from p2pinfer.client import Client
from p2pinfer.client_config import AuditConfig, ClientConfig
from p2pinfer.config import SharedConfig
from p2pinfer.node.concurrency.nurseries import open_nursery, outlasting
from p2pinfer.node.events import Event, Ready
from p2pinfer.node.host_config import HostConfig, dialling_only
from p2pinfer.routing.announcement import OfferedAdapter
from p2pinfer.served import offered_adapters
from p2pinfer.web.feed import Feed
from p2pinfer.web.site import Site

Told = Callable[[str, list[str]], None]  # the model, and URLs


async def serve_door(
    client: Client, site: Site, config: ApiConfig, keys: tuple[str, ...], tell: Told
) -> None:
    """Serve until cancelled.

    Args:
        client: An open one, whose swarm the page shows by `site`.
        tell: Called once it serves.

    Raises:
        AddressUnusable: The address is taken, or not of this machine.
    """

    def offers() -> list[OfferedAdapter]:
        return offered_adapters(client.member.announcements(client.spec.revision))

    app = App(client, config, keys, site, offers)
    async with open_nursery() as nursery:
        nursery.start_soon(app.warm_up)
        addresses = await nursery.start(serve_http, app.handle, config)
        urls = [f"http://{f'[{host}]' if ':' in host else host}:{port}" for host, port in addresses]
        tell(client.spec.model, urls)
        await trio.sleep_forever()


def serving_line(event: str, model: str, urls: list[str]) -> str:
    """Event of a server that is ready, as --json prints it."""
    return json.dumps({"event": event, "urls": urls, "model": model}) + "\n"


class NodeDoor:
    """The API and the page at a node, by a client of its own that joins the swarm through the node.

    Args:
        open_client: Given the node's addresses and the feed, opens that client.
        data_dir: Of the node, where runs of `tune` are kept too.
    """

    def __init__(
        self,
        open_client: Callable[[Ready, Feed], AbstractAsyncContextManager[Client]],
        config: ApiConfig,
        keys: tuple[str, ...],
        data_dir: Path,
        tell: Told,
    ) -> None:
        self._open_client = open_client
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
        async with outlasting(self._open_client(self._node, feed)) as client:
            await serve_door(client, Site(client, feed, self._data_dir), self._config, self._keys, self._tell)


def node_door(
    config: ApiConfig,
    keys: tuple[str, ...],
    shared: SharedConfig,
    host_config: HostConfig,
    client_config: ClientConfig,
    audit_config: AuditConfig,
    tell: Told,
) -> NodeDoor:
    """The door of a node with these settings. What its client learns goes to the ledger in `data_dir`."""

    @asynccontextmanager
    async def open_client(node: Ready, feed: Feed) -> AsyncGenerator[Client]:
        async with Client(
            model=shared.model,
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

    return NodeDoor(open_client, config, keys, shared.data_dir, tell)
