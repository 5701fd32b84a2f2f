"""Exchange of one request that generates: its events are written in the shapes of its dialect.

A stream begins when the first token is there, so that what fails before has a status of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

import msgspec
import trio

from p2pinfer.audit.tally import AuditTally
from p2pinfer.errors import P2PInferError
from p2pinfer.generation.generation import GenerationResult, Token
from p2pinfer.models.text.text import Tokenizer
from p2pinfer.node.concurrency.fast_lock import FastLock
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.session.terms import SessionAdapter

from .answers import Asked, Begun, Ended, Event, Piece, TextSource, prepare, run
from .errors import ApiError, as_api_error
from .http_server import Headers, Reply
from .tool_calls import ToolCall

logger = logging.getLogger(__name__)

PING_S: Final = 15.0  # proxies cut a connection that is silent for a minute
JSON: Final = "application/json"
# Ends of lines to httpx, by which ollama's client takes a stream apart; JSON escapes all others itself.
_LINE_ENDS: Final = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))


@dataclass(slots=True)
class Answer:
    """An answer that is complete: its tokens, its text and the tools that it called."""

    result: GenerationResult
    audits: AuditTally = field(default_factory=AuditTally)
    tokens: list[Token] = field(default_factory=list[Token])
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list[ToolCall])


class Shape(Protocol):
    """Form in which a dialect writes the answers to one request.

    Attributes:
        content_type: Of a stream.
        ping: Bytes of a stream that say nothing; empty if the dialect has none.
    """

    content_type: str
    ping: bytes

    def chunk(self, said: Event, /) -> bytes:
        """Words of a stream for an event; often none."""
        ...

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """All answers as one object."""
        ...

    def failed(self, error: ApiError) -> bytes:
        """Last words of a stream that cannot go on."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """A request as it is understood.

    Attributes:
        streamed: The answer is sent as it is generated.
        shape: Makes the shape of the answer, which may need the texts of tokens.
    """

    asked: Asked
    streamed: bool
    shape: Callable[[Tokenizer], Shape]


async def respond(
    source: TextSource, plan: Plan, adapter: SessionAdapter | None, reply: Reply, headers: Headers
) -> None:
    """Generate, tuned by `adapter`, and send what comes. A stream that fails is left without its end.

    Raises:
        P2PInferError: It failed, and nothing is sent yet.
    """
    generations = await prepare(source, plan.asked, adapter)
    shape = plan.shape(generations[0].tokenizer)
    if not plan.streamed:
        answers: dict[int, Answer] = {}

        async def collect(event: Event) -> None:
            match event:
                case Begun():
                    answers[event.index] = Answer(event.result)
                case Piece():
                    answer = answers[event.index]
                    answer.text += event.text
                    answer.calls += event.calls
                    if event.token is not None:
                        answer.tokens.append(event.token)
                case Ended():
                    answer = answers[event.index]
                    answer.result, answer.audits = event.result, event.audits

        await run(generations, collect, plan.asked.toolbox, source)
        results = [answers[index].result for index in range(len(generations))]
        headers = [*headers, *_told(results[0]), ("Server-Timing", server_timing(results[0]))]
        body = encode(shape.whole([answers[index] for index in range(len(generations))]))
        return await reply.whole(200, [("Content-Type", JSON), *headers], body)
    stream = _Stream(shape, reply, headers)
    try:
        async with open_nursery() as nursery:
            if shape.ping:
                nursery.start_soon(stream.keep_alive)
            await run(generations, stream.tell, plan.asked.toolbox, source)
    except P2PInferError as exc:
        if not reply.is_begun:
            raise
        logger.info("an answer was cut off: %s", exc)
        return await reply.send(shape.failed(as_api_error(exc)))
    return await reply.end()


class _Stream:
    """Sends the events of a request, one after the other."""

    def __init__(self, shape: Shape, reply: Reply, headers: Headers) -> None:
        self._shape = shape
        self._reply = reply
        self._headers = headers
        self._lock = FastLock()
        self._sent_at = trio.current_time()

    async def tell(self, event: Event) -> None:
        """Send what the shape says of it."""
        async with self._lock:
            if isinstance(event, Begun) and not self._reply.is_begun:
                kind = ("Content-Type", self._shape.content_type)
                headers = [kind, ("Cache-Control", "no-store"), *self._headers, *_told(event.result)]
                await self._reply.begin(200, headers)
            if chunk := self._shape.chunk(event):
                await self._reply.send(chunk)
                self._sent_at = trio.current_time()

    async def keep_alive(self) -> None:
        """Send a sign of life where nothing else has been sent for long."""
        while True:
            await trio.sleep_until(self._sent_at + PING_S)
            async with self._lock:
                if self._reply.is_begun and trio.current_time() >= self._sent_at + PING_S:
                    await self._reply.send(self._shape.ping)
                if trio.current_time() >= self._sent_at + PING_S:
                    self._sent_at = trio.current_time()


def encode(document: object) -> bytes:
    """JSON on one line, for whatever a client takes for a line."""
    encoded = msgspec.json.encode(document)
    if not encoded.isascii():
        for end, escape in _LINE_ENDS:
            encoded = encoded.replace(end, escape)
    return encoded


def report(result: GenerationResult, audits: AuditTally) -> dict[str, Any]:
    """Origin of an answer, and what audits have found so far: the field `p2pinfer` of every dialect."""
    return {
        "route": [
            {"peer_id": hop.peer_id, "blocks": [hop.span.start, hop.span.stop], "connection": hop.connection}
            for hop in result.route
        ],
        "per_hop_ms": [round(ms, 3) for ms in result.timings.per_hop_ms],
        "first_token_s": round(result.timings.first_token_s, 4),
        "tokens_per_s": round(result.timings.tokens_per_s, 2),
        "failovers": result.failovers,
        "audits": asdict(audits),
        "seed": result.seed,
    }


def server_timing(result: GenerationResult) -> str:
    """Header of that name: the time to the first token, and each hop's median per token."""
    hops = zip(result.route, result.timings.per_hop_ms, strict=False)
    parts = [f"first-token;dur={result.timings.first_token_s * 1e3:.1f}"]
    parts += [f'hop{i};dur={ms:.2f};desc="blocks {hop.span}"' for i, (hop, ms) in enumerate(hops, 1)]
    return ", ".join(parts)


def _told(result: GenerationResult) -> list[tuple[str, str]]:
    route = ", ".join(f"{hop.peer_id}@{hop.span}" for hop in result.route)
    return [("x-p2pinfer-route", route)]
