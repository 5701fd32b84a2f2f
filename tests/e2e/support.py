"""Real nodes, in processes of their own or in this one, and clients whose way is laid down."""

from __future__ import annotations

import json
import queue
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import trio

from p2pinfer.client import Client, ClientConfig
from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import NoRoute
from p2pinfer.generation.generation import Generation
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.text import Tokenizer
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.events import Event, Ready
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.node import NodeConfig, run_node
from p2pinfer.reputation.view import ReputationView
from p2pinfer.routing.planner import cheapest_routes
from p2pinfer.routing.policy import RoutingPolicy
from p2pinfer.routing.route import Candidate, Hop, Route, RouteRequest

from ..forking import fork_server

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
PATIENCE_S = 90.0  # a shared machine may be slow; nothing here waits for long where all is well
WORDS = " little dog the was big happy red ball day sun".replace(" ", ",").split(",")[1:]


class NodeProcess:
    """A `p2pinfer node` in a process of its own."""

    def __init__(self, home: Path, *flags: str) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.said_at_last = ""  # to standard error
        self._signalled = False
        self._said = (home / "stderr").open("w+")
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        argv = ["node", "--json", "--until-stdin-closes", "--listen", LOOPBACK, "--data-dir", str(home)]
        argv += ["--set", "compute.threads=1", *flags]
        self.process = fork_server().start(argv, cwd=home, stderr=self._said)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._events.put(json.loads(line))
        self._events.put(None)

    def wait_for(self, kind: str) -> dict[str, Any]:
        """The next event of a kind."""
        while True:
            event = self._events.get(timeout=PATIENCE_S)
            assert event is not None, f"the node ended: {self.said()}"
            if event["event"] == kind:
                return event

    def ready(self) -> tuple[str, str]:
        """Peer id and address, once it serves."""
        event = self.wait_for("ready")
        return event["peer_id"], event["addrs"][0]

    def said(self) -> str:
        """What it wrote to standard error."""
        self._said.flush()
        return Path(self._said.name).read_text(encoding="utf-8")

    def end(self) -> int:
        """Ask it to leave unless it is leaving, and wait for that; returns its exit code."""
        if not self._said.closed:
            try:
                self.signal(signal.SIGTERM)
                self.process.wait(timeout=PATIENCE_S)
            finally:
                self.process.kill()
                self.process.wait()
                self.said_at_last = self.said()
                for stream in (self.process.stdin, self.process.stdout):
                    assert stream is not None
                    stream.close()
                self._said.close()
        return self.process.wait()

    def signal(self, signum: signal.Signals) -> None:
        """Send the first signal; a second one would end it without a goodbye, and is not sent."""
        if not self._signalled:
            self.process.send_signal(signum)
        self._signalled = True


StartNode: TypeAlias = Callable[..., NodeProcess]  # of blocks, as 0:8


@dataclass(frozen=True)
class Swarm:
    """Nodes that all hold every block, and where to join them."""

    model: str
    address: str
    peers: tuple[str, ...]
    home: Path

    @asynccontextmanager
    async def client(
        self,
        *hops: tuple[int, int, int],
        dtype: str = "float32",
        session: SessionConfig | None = None,
        find_timeout_s: float = 20.0,
        wait_s: float = 60.0,
        speculate: str = "auto",
        **options: Any,
    ) -> AsyncGenerator[Client]:
        """A client; with hops, (peer, start, stop) each, one that goes this way while it can."""
        if hops:
            options["policy"] = Along((self.peers[peer], start, stop) for peer, start, stop in hops)
        client = Client(
            model=self.model,
            bootstrap=[self.address],
            config=ClientConfig(
                dtype=dtype,
                device="cpu",
                find_timeout_s=find_timeout_s,
                wait_s=wait_s,
                speculate=speculate,
            ),
            session_config=session,
            cache_dir=self.home,
            data_dir=self.home,
            **options,
        )
        async with client:
            yield client


class Along(RoutingPolicy):
    """The way that was laid down; once a peer of it has failed, any other."""

    def __init__(self, hops: Any) -> None:
        self._hops: list[tuple[str, int, int]] = list(hops)

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        known = {candidate.peer_id: candidate for candidate in candidates}
        if any(peer_id in request.excluded for peer_id, _, _ in self._hops):
            return cheapest_routes(candidates, request, view)
        if not all(peer_id in known for peer_id, _, _ in self._hops):
            raise NoRoute("not everybody is here yet")
        hops: list[Hop] = [known[peer].hop(BlockSpan(start, stop)) for peer, start, stop in self._hops]
        return [Route(tuple(hops))]


@asynccontextmanager
async def open_nodes(
    folder: Path | str,
    home: Path,
    spans: Sequence[tuple[int, int]],
    *,
    dtype: str = "float32",
    serve: ServeConfig | None = None,
    bootstrap: str = "",
    report: Callable[[Event], None] = lambda _: None,
) -> AsyncGenerator[Swarm]:
    """Nodes in this process, over libp2p all the same; they leave when the block ends."""
    compute = ComputeConfig(device="cpu", dtype=dtype, threads=1, cache_bytes=64 << 20)
    peers: list[str] = []
    address = bootstrap
    async with open_nursery() as nursery:
        for index, (start, stop) in enumerate(spans):
            config = NodeConfig(
                model=str(folder),
                blocks=f"{start}:{stop}",
                data_dir=home / str(index),
                cache_dir=home,
                bootstrap=(address,) if address else (),
            )
            ready: Ready = await nursery.start(partial(_run_node, config, compute, serve, report))
            peers.append(ready.peer_id)
            address = address or ready.addrs[0]
        yield Swarm(str(folder), address, tuple(peers), home)


async def _run_node(
    config: NodeConfig,
    compute: ComputeConfig,
    serve: ServeConfig | None,
    report: Callable[[Event], None],
    *,
    task_status: trio.TaskStatus[Ready],
) -> None:
    def note(event: Event) -> None:
        report(event)
        if isinstance(event, Ready):
            task_status.started(event)

    await run_node(
        config,
        host_config=HostConfig(listen=(LOOPBACK,)),
        compute_config=compute,
        serve_config=serve,
        report=note,
    )


def until(happened: Callable[[], bool]) -> None:
    """Wait for what processes do."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


async def text_of(generation: Generation) -> str:
    """All of a generation's text."""
    async for _ in generation:
        pass
    return generation.result.text


def prompt_of(tokenizer: Tokenizer, tokens: int) -> str:
    """A text that the bundled model's tokenizer makes so many tokens of."""
    text = "".join(f" {WORDS[(index * 7 + index // 5) % len(WORDS)]}" for index in range(tokens - 1))
    assert len(tokenizer.encode(text)) == tokens
    return text
