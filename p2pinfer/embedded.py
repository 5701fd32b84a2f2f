"""Embedded swarm of node processes on loopback, for when no other is in reach.

The nodes are `p2pinfer node` as anybody would start it, each with an identity and a data directory of its
own, joined through our own host. Their standard input is a pipe from us, so they leave when this process
ends, also when it is killed.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

import trio

from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.host_config import HostConfig, dialling_only
from p2pinfer.node.transport.addresses import split_peer
from p2pinfer.node.transport.identity import load_identity

from .client import Client
from .config import FILE_NAME, environment_without_settings
from .errors import LocalError

logger = logging.getLogger(__name__)

SPANS = (BlockSpan(0, 3), BlockSpan(3, 5), BlockSpan(5, 8))  # the bundled model's 8 blocks, unevenly
SERVED_TIMEOUT_S = 1.5  # how long a swarm in reach has to name somebody who serves the model
START_TIMEOUT_S = 90.0  # importing torch from a cold disk takes a slow machine half a minute
LEAVE_TIMEOUT_S = 5.0
IN_REACH_TIMEOUT_S = 3.0  # how long bootstrap peers have to answer where there is another way
BOOTSTRAP_TIMEOUT_S = 2.5  # how long they have where there is none: a handshake takes four round trips
_LAST_WORDS_BYTES = 2000


@dataclass(frozen=True, slots=True)
class EmbeddedNode:
    """One node of an embedded swarm."""

    span: BlockSpan
    process: trio.Process
    home: Path

    def last_words(self) -> str:
        """The end of what it wrote to standard error, on one line."""
        written = (self.home / "stderr").read_bytes()[-_LAST_WORDS_BYTES:].decode(errors="replace")
        return " | ".join(line.strip() for line in written.splitlines()[-3:]) or "it said nothing"


def may_embed(model: str, bootstrap: Sequence[str], config: HostConfig) -> bool:
    """True if nodes of our own may stand in for a swarm that is not in reach.

    They may if nobody named one, and all of the model is here: the bundled one, a folder, or a GGUF file.
    """
    named = bootstrap or config.swarm_key is not None or config.allow
    is_here = model == BUNDLED_MODEL or (bool(model) and Path(model).expanduser().exists())
    return is_here and not named


def embedded_spans(num_blocks: int) -> list[BlockSpan]:
    """The blocks of each node, unevenly, as they are in a swarm: 0:3, 3:5, 5:8 of eight."""
    cuts = [0, num_blocks * 3 // 8 or 1, num_blocks * 5 // 8 or 1, num_blocks]
    cuts = sorted({min(cut, num_blocks) for cut in cuts})
    return [BlockSpan(start, stop) for start, stop in pairwise(cuts)]


def client_host_config(config: HostConfig, *, embedding: bool) -> HostConfig:
    """Settings of a client's host, which listens only if it may become its own nodes' meeting point."""
    return replace(dialling_only(config), listen=("/ip4/127.0.0.1/tcp/0",) if embedding else ())


@asynccontextmanager
async def swarm_in_reach(
    client: Client,
    *,
    embedding: bool,
    on_embedding: Callable[[int, int], None] = lambda ready, total: None,
    on_others: Callable[[str], None] = lambda said: logger.info("%s", said),
) -> AsyncGenerator[bool]:
    """Make sure that `client` has a swarm until the block ends, with nodes of our own if that is allowed.

    Yields True if they are our own. A swarm in reach where nobody serves the model is none. Then client and
    nodes keep to each other, and the client's ledger begins anew, in memory.

    Args:
        embedding: What `may_embed` said when the client was made.
        on_embedding: Called when nodes are started and whenever one is ready, with how many are and how many
            there will be.
        on_others: Called with what the swarm in reach serves, if nobody there serves the model.

    Raises:
        PeerUnreachable: No bootstrap peer answered, and `embedding` is False.
        LocalError: As `open_embedded_swarm`.
    """
    if not embedding:
        await client.member.reach_somebody(BOOTSTRAP_TIMEOUT_S)
        yield False
        return
    member = client.member
    if await member.wait_settled(IN_REACH_TIMEOUT_S) and await client.is_served(SERVED_TIMEOUT_S):
        yield False
        return
    if others := client.others_served():
        on_others(others)
    spans = embedded_spans(client.spec.num_blocks)
    on_embedding(0, len(spans))
    async with open_embedded_swarm(
        member.addrs,
        model=client.model,
        spans=spans,
        cache_dir=client.cache_dir,
        on_ready=lambda ready: on_embedding(ready, len(spans)),
        on_identities=member.keep_to,
    ) as nodes:
        await client.keep_no_record(vouched=[load_identity(node.home).peer_id for node in nodes])
        yield True


@asynccontextmanager
async def open_embedded_swarm(
    meeting_point: Sequence[str],
    *,
    model: str,
    spans: Sequence[BlockSpan] = SPANS,
    compute: ComputeConfig | None = None,
    cache_dir: Path | None = None,
    on_identities: Callable[[Sequence[str]], Awaitable[None]] | None = None,
    on_ready: Callable[[int], None] = lambda count: None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> AsyncGenerator[tuple[EmbeddedNode, ...]]:
    """Start one node process per span, all at once; yields when all serve, and ends them afterwards.

    Args:
        meeting_point: The multiaddrs, with /p2p/, that the nodes join by: our own host's.
        compute: How every node computes; one thread each, and the defaults otherwise.
        cache_dir: Where hashes of a folder's files are kept; the default folder otherwise.
        on_identities: Awaited with the nodes' peer ids before any of them is started.
        on_ready: Called with the number of nodes that serve, each time it grows.

    Raises:
        LocalError: A node ended or was not ready in time; the message has its last words.
    """
    # One thread each: several processes share this machine's cores, and would wait for each other.
    compute = compute or ComputeConfig(threads=1)
    nodes: list[EmbeddedNode] = []
    home = Path(tempfile.mkdtemp(prefix="p2pinfer-"))
    try:
        async with open_nursery() as nursery:
            try:
                homes = [home / str(index) for index in range(len(spans))]
                peer_ids = [load_identity(each).peer_id for each in homes]
                if on_identities is not None:
                    await on_identities(peer_ids)
                # They keep to themselves: what they announce leads to loopback, and would mislead a swarm.
                allow = [*peer_ids, *(split_peer(address)[1] for address in meeting_point)]
                for each, span in zip(homes, spans, strict=True):
                    _configure(each, compute, allow, cache_dir)
                    nodes.append(await _start(each, model, span, meeting_point))
                await _wait_ready(nursery, nodes, on_ready, start_timeout_s)
                yield tuple(nodes)
            finally:
                await _end(nodes)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _configure(home: Path, compute: ComputeConfig, allow: Sequence[str], cache_dir: Path | None) -> None:
    lines = [] if cache_dir is None else [f"cache_dir = {json.dumps(str(cache_dir.absolute()))}"]
    lines += ["[host]", f"allow = {json.dumps(allow)}", "[compute]"]
    lines += [f"{each.name} = {json.dumps(getattr(compute, each.name))}" for each in fields(compute)]
    (home / FILE_NAME).write_text("\n".join([*lines, ""]), encoding="utf-8")


async def _start(home: Path, model: str, span: BlockSpan, meeting_point: Sequence[str]) -> EmbeddedNode:
    if model != BUNDLED_MODEL and (here := Path(model).expanduser()).exists():
        model = str(here.absolute())  # the node runs elsewhere
    command = [sys.executable, "-m", "p2pinfer", "node", "--json", "--until-stdin-closes"]
    command += ["--model", model, "--blocks", str(span), "--data-dir", str(home)]
    command += ["--listen", "/ip4/127.0.0.1/tcp/0"]
    for address in meeting_point:
        command += ["--bootstrap", address]
    with (home / "stderr").open("wb") as stderr:
        process = await trio.lowlevel.open_process(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=home,  # `-m` looks for modules there first, and bootstrap_peers.txt would be read there
            env=environment_without_settings(),
            start_new_session=True,  # a Ctrl-C is for us; we end the nodes in our own time
        )
    logger.debug("embedded.start pid=%d blocks=%s", process.pid, span)
    return EmbeddedNode(span, process, home)


async def _wait_ready(
    nursery: trio.Nursery, nodes: Sequence[EmbeddedNode], on_ready: Callable[[int], None], timeout_s: float
) -> None:
    """Wait until every node serves; reads what they print for as long as `nursery` runs."""
    ready: set[int] = set()
    changed = trio.Event()

    async def listen(index: int, node: EmbeddedNode) -> None:
        nonlocal changed
        assert node.process.stdout is not None
        buffer = b""
        async for received in node.process.stdout:
            if index in ready:
                continue  # read on, or a full pipe would stop the node
            *lines, buffer = (buffer + received).split(b"\n")
            if any(json.loads(line)["event"] == "ready" for line in lines):
                ready.add(index)
                changed.set()
                on_ready(len(ready))
        ended.add(index)
        changed.set()

    ended: set[int] = set()
    for index, node in enumerate(nodes):
        nursery.start_soon(listen, index, node)
    with trio.move_on_after(timeout_s):
        while len(ready) < len(nodes):
            await changed.wait()
            changed = trio.Event()
            for index in ended:
                node = nodes[index]
                raise LocalError(f"the embedded node for blocks {node.span} ended: {node.last_words()}")
        return
    late = next(node for index, node in enumerate(nodes) if index not in ready)
    raise LocalError(
        f"the embedded node for blocks {late.span} was not ready in {timeout_s:g} s: {late.last_words()}"
    )


async def _end(nodes: Sequence[EmbeddedNode]) -> None:
    """Ask every node to leave, wait for it, and kill those that do not. Shielded and bounded."""
    with trio.CancelScope(shield=True):
        for node in nodes:
            node.process.terminate()
        with trio.move_on_after(LEAVE_TIMEOUT_S):
            for node in nodes:
                await node.process.wait()
        for node in nodes:
            if node.process.returncode is None:
                logger.warning("the embedded node for blocks %s had to be killed", node.span)
                node.process.kill()
                await node.process.wait()
            for stream in (node.process.stdin, node.process.stdout):
                assert stream is not None
                await stream.aclose()
