"""Way of a request: who sends it, what it asks, its turn, its answer, and errors in its dialect's shape."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol
from urllib.parse import unquote

import trio

from p2pinfer.errors import P2PInferError
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.routing.announcement import OfferedAdapter

from .access import Access
from .admission import Admission
from .answers import TextSource
from .config import ApiConfig
from .dialects import MODELS, Dialect, dialect_of
from .errors import ApiError, as_api_error
from .exchange import JSON, Plan, encode, respond
from .http_server import BadBody, Gone, Headers, Reply, Request
from .served_models import ServedModels

logger = logging.getLogger(__name__)

_SAFE: Final = (
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
)
_HELLO: Final = b"p2pinfer is running\n"
_MODEL: Final = f"{MODELS}/"


class Pages(Protocol):
    """Pages that a server shows beside its API. Both give False where they have nothing at the path."""

    async def show(self, request: Request, reply: Reply, headers: Headers) -> bool:
        """Send what everybody may see who reaches the server."""
        ...

    async def tell(self, request: Request, reply: Reply, headers: Headers) -> bool:
        """Send what needs an API key where the API does."""
        ...


class App:
    """Answers requests with texts of `sources`, one for each model."""

    def __init__(
        self,
        sources: Sequence[TextSource],
        config: ApiConfig,
        keys: tuple[str, ...] = (),
        pages: Pages | None = None,
        adapters: Callable[[ModelSpec], Sequence[OfferedAdapter]] = lambda _: (),
    ) -> None:
        self._pages = pages
        self._access = Access(keys, config)
        self._admission = Admission(config)
        self._models = ServedModels(sources, config, adapters)

    async def warm_up(self) -> None:
        """Make the first conversation as quick as the next ones."""
        for model in self._models.models:
            if model.template is not None:
                await trio.to_thread.run_sync(model.template.warm_up, abandon_on_cancel=True)

    async def handle(self, request: Request, reply: Reply) -> None:
        """Answer one request; whatever it is, it gets an answer in the shape of its dialect."""
        dialect = dialect_of(request.path, request.headers)
        headers: Headers = _SAFE
        try:
            self._access.check_page(request.headers)
            headers = [*_SAFE, *self._cors(request)]
            await self._answer(request, reply, dialect, headers)
        except Gone:
            raise
        except ApiError as exc:
            await _refuse(exc, reply, dialect, headers)
        except BadBody as exc:
            await _refuse(ApiError(str(exc), status=exc.status), reply, dialect, headers)
        except P2PInferError as exc:
            await _refuse(as_api_error(exc), reply, dialect, headers)
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            bug = ApiError("this server has a bug; its log has a traceback to report", "bug")
            await _refuse(bug, reply, dialect, headers)

    async def _answer(self, request: Request, reply: Reply, dialect: Dialect, headers: Headers) -> None:
        method, path = request.method, request.path
        if method == "OPTIONS":
            return await reply.whole(204, [*headers, *_preflight(request)], b"")
        if self._pages is not None and await self._pages.show(request, reply, headers):
            return None
        if path == "/" and method in ("GET", "HEAD"):
            return await reply.whole(200, [("Content-Type", "text/plain"), *headers], _HELLO)
        key = self._access.check_key(request.headers)
        if self._pages is not None and await self._pages.tell(request, reply, headers):
            return None
        if path in dialect.generate:
            _check_method(method, "POST", path)
            _check_encoding(request)
            body = await request.read()
            served = self._models.asked(body)
            told = dialect.generate[path](body, served.model)
            if isinstance(told, Plan):
                async with self._admission.turn(key):
                    adapter = await self._models.adapter_of(served)
                    return await respond(served.source, told, adapter, reply, headers)
        elif path in dialect.ask:
            _check_method(method, "POST", path)
            _check_encoding(request)
            body = await request.read()
            served = self._models.asked(body)
            async with self._admission.turn(key):
                told = await dialect.ask[path](body, served.model, served.source)
        elif path in dialect.tell:
            _check_method(method, "GET", path)
            told = dialect.tell[path](self._models.listed)
        elif path.startswith(_MODEL) and dialect.model is not None:
            _check_method(method, "GET", path)
            told = dialect.model(self._models.named(unquote(path.removeprefix(_MODEL))).model)
        elif path in dialect.lacking:
            served = self._models.asked(await request.read())
            raise ApiError(f"{served.model.id} {dialect.lacking[path]}", param="model")
        else:
            raise ApiError(
                f"there is no {path[:200]} here; there are {', '.join(sorted(dialect.paths))}", "not_found"
            )
        return await reply.whole(200, [("Content-Type", JSON), *headers], encode(told))

    def _cors(self, request: Request) -> Headers:
        origin = self._access.allowed_origin(request.headers)
        return [] if origin is None else [("Access-Control-Allow-Origin", origin), ("Vary", "Origin")]


def _preflight(request: Request) -> Headers:
    """Headers that tell a page what it may send."""
    if "origin" not in request.headers:
        return []
    return [
        ("Access-Control-Allow-Methods", "GET, POST"),
        ("Access-Control-Allow-Headers", "*, Authorization"),
        ("Access-Control-Max-Age", "600"),
    ]


def _check_method(method: str, wanted: str, path: str) -> None:
    if method != wanted and not (method == "HEAD" and wanted == "GET"):
        raise ApiError(f"{path} takes {wanted}, not {method}", status=405)


def _check_encoding(request: Request) -> None:
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError("compressed requests are not supported; send it as it is", status=415)


async def _refuse(error: ApiError, reply: Reply, dialect: Dialect, headers: Headers) -> None:
    if reply.is_begun:  # nothing but the missing end can tell the client
        return
    if error.retry_after_s is not None:
        headers = [*headers, ("Retry-After", str(error.retry_after_s))]
    if error.kind == "authentication":
        headers = [*headers, ("WWW-Authenticate", "Bearer")]
    await reply.whole(error.status, [("Content-Type", JSON), *headers], encode(dialect.error_body(error)))
