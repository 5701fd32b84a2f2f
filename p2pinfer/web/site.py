"""Page to chat in and to look at the swarm: its files, the swarm's state, events of routes, and trainings.

The files are for everybody who reaches the server. What the page then asks for needs an API key where the
API does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs

import msgspec
import trio

from p2pinfer.api.errors import ApiError
from p2pinfer.api.exchange import JSON, encode
from p2pinfer.api.http_server import Headers, Reply, Request
from p2pinfer.node.concurrency.fast_lock import FastLock
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.swarm_view import SwarmView

from .feed import Feed, Following
from .swarm_state import Observer, state_document
from .trainings import TrainingDocument, read_trainings

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STATE: Final = "/p2pinfer/swarm"
EVENTS: Final = "/p2pinfer/events"
TRAININGS: Final = "/p2pinfer/trainings"
PING_S: Final = 15.0  # as in answers: proxies cut what is silent
_KINDS: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class File:
    """A file of the page, and a name of its contents (`ETag`)."""

    kind: str
    body: bytes
    tag: str


def load_files() -> dict[str, File]:
    """Files of the page by path; `/` is its beginning."""
    found: dict[str, File] = {}
    for each in (files("p2pinfer") / "web" / "page").iterdir():
        kind = _KINDS.get(each.name.rpartition(".")[2])
        if kind is not None:
            body = each.read_bytes()
            path = "/" if each.name == "index.html" else f"/page/{each.name}"
            found[path] = File(kind, body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return found


@dataclass(frozen=True, slots=True)
class Site:
    """Answers what the page asks of a server beside its API.

    Attributes:
        clients: One for each model, which sees that model's swarm.
        feed: Events of them all.
        data_dir: Where trainings are noted; without one there are none to show.
        kept: Ledger on disk, where a client has one in memory; its bans are shown too.
    """

    clients: Sequence[Observer]
    feed: Feed
    data_dir: Path | None = None
    kept: Ledger | None = None
    _files: dict[str, File] = field(default_factory=load_files, init=False)

    async def show(self, request: Request, reply: Reply, headers: Headers) -> bool:
        """Send a file of the page; False if there is none of that path."""
        file = self._files.get(request.path)
        if file is None or request.method not in ("GET", "HEAD"):
            return False
        headers = [
            *((name, value) for name, value in headers if name != "Content-Security-Policy"),
            ("Content-Security-Policy", POLICY),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-cache"),
            ("ETag", file.tag),
        ]
        if request.headers.get("if-none-match") == file.tag:
            await reply.whole(304, headers, b"")
        else:
            await reply.whole(200, [("Content-Type", file.kind), *headers], file.body)
        return True

    async def tell(self, request: Request, reply: Reply, headers: Headers) -> bool:
        """Send the state of a swarm, events or trainings; False if the path is none of theirs.

        Raises:
            ApiError: Too many pages follow the events already, or no model has the name that is asked for.
        """
        if request.method != "GET" or request.path not in (STATE, EVENTS, TRAININGS):
            return False
        headers = [("Cache-Control", "no-store"), *headers]
        if request.path == STATE:
            await reply.whole(200, [("Content-Type", JSON), *headers], await self._state(request.query))
            return True
        if request.path == TRAININGS:
            trainings = () if self.data_dir is None else await _read(self.data_dir)
            await reply.whole(200, [("Content-Type", JSON), *headers], encode(TrainingsDocument(trainings)))
            return True
        with self.feed.follow() as following:
            if following is None:
                raise ApiError("too many pages follow the events; close one", "busy", retry_after_s=60)
            await reply.begin(200, [("Content-Type", "text/event-stream"), *headers])
            await _send(following, reply)
        await reply.end()
        return True

    async def _state(self, query: str) -> bytes:
        """State of the swarm of the model that is asked for, else of the first one."""
        models = [client.spec.model for client in self.clients]
        (name,) = parse_qs(query).get("model", models[:1])[:1]
        if name not in models:
            raise ApiError(f"the model {name[:200]!r} is not served here", "not_found", param="model")
        client = self.clients[models.index(name)]
        view = SwarmView(client.spec, tuple(client.peers()))
        # In a thread: the reasons for a thousand peers' scores take tenths of a second.
        state = partial(state_document, view, client.ledger, self.kept, models)
        return await trio.to_thread.run_sync(lambda: encode(state()))


class TrainingsDocument(msgspec.Struct, frozen=True):
    """Trainings of this computer, the latest first."""

    trainings: tuple[TrainingDocument, ...]


async def _read(data_dir: Path) -> tuple[TrainingDocument, ...]:
    return await trio.to_thread.run_sync(read_trainings, data_dir)


async def _send(following: Following, reply: Reply) -> None:
    """Events as they happen, and a sign of life where none happens for long."""
    lock = FastLock()

    async def keep_alive() -> None:
        while True:
            async with lock:
                await reply.send(b": still here\n\n")
            await trio.sleep(PING_S)

    async with open_nursery() as nursery:
        nursery.start_soon(keep_alive)
        for begun in following.begun:
            async with lock:
                await reply.send(b"data: " + encode(begun) + b"\n\n")
        async for event in following.events:
            async with lock:
                await reply.send(b"data: " + encode(event) + b"\n\n")
        nursery.cancel_scope.cancel()
