"""A client that says where it is, and waits for a word, so that harm comes at the very moment that is meant.

Reads a JSON object a line, a generation each, and writes what happens: `ready`, `now` (the moment has come;
it does nothing more until a line is read), `spare` (hops have opened the session that are to take over; the
same), `token`, `ended`. Times are seconds of the machine's monotonic clock.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio

from p2pinfer.client import Client, ClientConfig
from p2pinfer.client_config import AuditConfig, SessionConfig
from p2pinfer.errors import NoRoute, P2PInferError
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.draws import Draw
from p2pinfer.reputation.view import ReputationView
from p2pinfer.routing.policy import RoutingPolicy
from p2pinfer.routing.route import Candidate, Route, RouteRequest
from p2pinfer.session.chain import Replacement, ReplaySource
from p2pinfer.session.session import Session
from p2pinfer.session.terms import PLAIN, Packing, SessionAdapter

from ..lab.pinned import can_be_dialled
from .requests import Request, history

CHUNK_TOKENS = 128  # a prompt of 512 tokens is four steps
HARMED_CHUNK = 2  # of them, when "at prefill" has come
NEW_TOKENS = 60  # so that several speculated steps follow the one that is harmed
TOKENS_BEFORE = 6  # until "between steps" and "inside a step" have come
FIND_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.watched")
    parser.add_argument("--bootstrap", action="append", required=True)
    asked = parser.parse_args()
    for line in sys.stdin:
        with tempfile.TemporaryDirectory(prefix="p2pinfer-watched-") as home:
            trio.run(_generate, json.loads(line), asked.bootstrap, Path(home))


async def _generate(order: Mapping[str, Any], bootstrap: Sequence[str], home: Path) -> None:
    hops = [(str(peer), BlockSpan(*span)) for peer, span in order["route"]]
    policy = Laid(hops, order["spares"], anywhere=order["anywhere"])
    request: Request = history(order["seed"], new_tokens=NEW_TOKENS)
    client = WatchedClient(
        order["moment"],
        bootstrap=bootstrap,
        policy=policy,
        config=ClientConfig(dtype="float32", device="cpu", find_timeout_s=FIND_S, wait_s=FIND_S),
        session_config=SessionConfig(chunk_tokens=CHUNK_TOKENS, slow_step_s=FIND_S),
        audit=AuditConfig(rate=0.0),
        cache_dir=home,
        data_dir=home,
    )
    ids: list[int] = []
    try:
        async with client:
            generation = client.generate(request.prompt, request.config)
            async for token in generation:
                say("token", at=time.monotonic())
                ids.append(token.id)
                if len(ids) == TOKENS_BEFORE:
                    client.arm()
            result = generation.result
            say("ended", ids=ids, failovers=result.failovers, went=client.opened)
    except P2PInferError as exc:
        say("ended", ids=ids, failovers=0, went=client.opened, error=f"{type(exc).__name__}: {exc}")


class WatchedClient(Client):
    """Says when a session has come to the moment, and when it has found others for hops that failed."""

    def __init__(self, moment: str, **options: Any) -> None:
        super().__init__(**options)
        self.opened: list[str] = []  # the peers of the first session
        self._moment = moment
        self._is_armed = False
        self._pushed = 0

    def arm(self) -> None:
        """The next step is the one that harm is to meet, unless it met the prompt."""
        self._is_armed = self._moment != "at prefill"

    async def open_session(
        self,
        tokens: int,
        excluded: frozenset[str],
        replay_source: ReplaySource | None = None,
        adapter: SessionAdapter | None = None,
        draw: Draw | None = None,
        packing: Packing = PLAIN,
    ) -> Session:
        terms = replay_source, adapter, draw, packing
        session = await super().open_session(tokens, excluded, *terms)
        if not self.opened:
            self.opened = list(session.route.peer_ids)
            watched: Any = session
            watched._submit = partial(self._submit, watched._submit)
            watched.chain.open_replacement = partial(self._open_replacement, watched.chain.open_replacement)
        return session

    async def _submit(self, submit: Any, *args: Any, **options: Any) -> Any:
        # A speculated step brings several tokens, so "between steps" is where the next one is sent and not
        # where a token came: others of the same step follow at once, whatever happens to the hops.
        if self._is_armed and self._moment == "between steps":
            self._is_armed = False
            say_and_wait("now")
        promise = await submit(*args, **options)
        self._pushed += 1
        if self._is_armed or (self._moment == "at prefill" and self._pushed == HARMED_CHUNK):
            self._is_armed = False
            say_and_wait("now")
        return promise

    async def _open_replacement(self, open_replacement: Any, *args: Any) -> Replacement:
        spare: Replacement = await open_replacement(*args)
        say_and_wait("spare", peers=[hop.peer_id for hop in spare.hops])
        return spare


class Laid(RoutingPolicy):
    """The way that was laid down, once, and then for what fails the first spare that has not failed."""

    def __init__(
        self, hops: Sequence[tuple[str, BlockSpan]], spares: Sequence[str], *, anywhere: bool
    ) -> None:
        """With `anywhere`, peers are waited for until they have announced how they are reached from there."""
        self._usable = can_be_dialled if anywhere else bool
        self._hops = hops
        self._spares = spares
        self._is_laid = False

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        known = {candidate.peer_id: candidate for candidate in candidates if self._usable(candidate)}
        peers = {peer for peer, _ in self._hops}
        if not self._is_laid:
            if not known.keys() >= peers | set(self._spares):
                raise NoRoute("not everybody is here yet")
            self._is_laid = True
            return [Route(tuple(known[peer].hop(span) for peer, span in self._hops))]
        usable = [peer for peer in self._spares if peer in known and peer not in request.excluded]
        if not usable:
            raise NoRoute("no spare is left")
        return [Route((known[usable[0]].hop(request.wanted),))]


def say(event: str, **details: Any) -> None:
    print(json.dumps({"event": event, **details}), flush=True)


def say_and_wait(event: str, **details: Any) -> None:
    """Nothing moves in this process until a line is read."""
    say(event, **details)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
