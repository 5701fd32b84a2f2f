"""Way of a request: who sends it, what it asks, its turn, its answer, and errors in its dialect's shape."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol
from urllib.parse import unquote

import trio

from p2pinfer.errors import P2PInferError
from p2pinfer.routing.announcement import OfferedAdapter

from .access import Access
from .admission import Admission
from .answers import TextSource
from .config import ApiConfig
from .dialects import MODELS, Dialect, dialect_of
from .errors import ApiError, as_api_error
from .exchange import JSON, Plan, encode, respond
from .http_server import BadBody, Gone, Headers, Reply, Request
from .served_model import ServedModel

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
    """Answers requests with texts of `source`."""

    def __init__(
        self,
        source: TextSource,
        config: ApiConfig,
        keys: tuple[str, ...] = (),
        pages: Pages | None = None,
        adapters: Callable[[], Sequence[OfferedAdapter]] = tuple,
    ) -> None:
        self._source = source
        self._pages = pages
        self._access = Access(keys, config)
        self._admission = Admission(config)
        self._model = ServedModel(source.spec, config, source.chat_template, adapters)

    async def warm_up(self) -> None:
        """Make the first conversation as quick as the next ones."""
        if (template := self._source.chat_template) is not None:
            await trio.to_thread.run_sync(template.warm_up, abandon_on_cancel=True)

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
            told = dialect.generate[path](await request.read(), self._model)
            if isinstance(told, Plan):
                async with self._admission.turn(key):
                    return await respond(self._source, told, reply, headers)
        elif path in dialect.ask:
            _check_method(method, "POST", path)
            _check_encoding(request)
            body = await request.read()
            async with self._admission.turn(key):
                told = await dialect.ask[path](body, self._model, self._source)
        elif path in dialect.tell:
            _check_method(method, "GET", path)
            told = dialect.tell[path](self._model)
        elif path.startswith(_MODEL) and dialect.model is not None:
            _check_method(method, "GET", path)
            self._model.check(unquote(path.removeprefix(_MODEL)))
            told = dialect.model(self._model)
        elif path in dialect.lacking:
            raise ApiError(f"{self._model.id} {dialect.lacking[path]}", param="model")
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
