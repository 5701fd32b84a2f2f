"""Second opinion: another peer runs a span again, and should not notice that it serves a check.

The session comes from an identity that is made for it and thrown away, over a host of its own. It looks like
others: it reserves what a generation does, a prompt comes in chunks, a few tokens come one by one. Outputs of
an inner span go on to a peer that serves the blocks after it. Two things differ. The inputs of an inner span
come from the client, since no other peer would give exactly those. And the last span returns all outputs of
the prompt, since they are all that there is of it. Whom to ask is drawn from those least likely to belong to
whoever is checked: another network first.
"""

from __future__ import annotations

import ipaddress
import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

import torch
import trio

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import PeerError, ProtocolViolation
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.numerics import Numerics, are_comparable, row_bytes
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.evidence.hop_record import History, HopRecord
from p2pinfer.node.host.host import Host, HostConfig, open_host
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.reputation.view import ReputationView
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.route import Hop, Route
from p2pinfer.session.hosting import open_session

from .collect import collect_record

ASKED_TOKENS: Final = 128  # reserved beside the inputs, as a generation does for its new tokens
DECODED_TOKENS: Final = 8  # of the inputs, that come one by one

_IP = re.compile(r"/ip[46]/([0-9a-fA-F.:]+)/")


class Judged(Protocol):
    """Work that is to be done again: a session's or a pass's."""

    @property
    def peer_id(self) -> str: ...
    @property
    def span(self) -> BlockSpan: ...
    @property
    def numerics(self) -> Numerics | None: ...


def choose_auditors(
    announcements: Iterable[Announcement],
    record: Judged,
    view: ReputationView,
    avoid: Sequence[str],
    rng: random.Random,
) -> list[Hop]:
    """Peers that serve the span in comparable numerics: other networks first, then at random.

    Args:
        avoid: Peers that had to do with the session.
    """
    known = list(announcements)
    accused = next((each.addrs for each in known if each.peer_id == record.peer_id), ())
    networks = networks_of(accused)
    able = [
        each
        for each in known
        if each.peer_id not in avoid
        and each.peer_id != record.peer_id
        and each.span.covers(record.span)
        and are_comparable(each.numerics, record.numerics)
        and not view.is_banned(each.peer_id)
    ]
    rng.shuffle(able)
    able.sort(key=lambda each: (bool(networks & networks_of(each.addrs)), -_trust(view, each.peer_id)))
    return [Hop(each.peer_id, record.span, each.addrs, each.dtype) for each in able]


def networks_of(addrs: Iterable[str]) -> frozenset[str]:
    """The /16 of every IPv4 and the /32 of every IPv6 address: what one owner is likely to have all of."""
    found: set[str] = set()
    for address in addrs:
        match = _IP.search(address + "/")
        if match is None:
            continue
        try:
            ip = ipaddress.ip_address(match[1])
        except ValueError:
            continue
        found.add(str(ipaddress.ip_network((ip, 16 if ip.version == 4 else 32), strict=False)))
    return frozenset(found)


def draw_successors(
    hop: Hop,
    announcements: Iterable[Announcement],
    spec: ModelSpec,
    view: ReputationView,
    avoid: Sequence[str],
    rng: random.Random,
) -> tuple[Hop, ...]:
    """Peers for all blocks after those of `hop`, drawn at random; none if nobody serves some of them."""
    able = [
        each
        for each in announcements
        if each.peer_id not in (hop.peer_id, *avoid) and not view.is_banned(each.peer_id)
    ]
    drawn: list[Hop] = []
    block = hop.span.stop
    while block < spec.num_blocks:
        used = {each.peer_id for each in drawn}
        serving = [
            each for each in able if each.span.start <= block < each.span.stop and each.peer_id not in used
        ]
        if not serving:
            return ()
        chosen = rng.choice(serving)
        drawn.append(Hop(chosen.peer_id, BlockSpan(block, chosen.span.stop), chosen.addrs, chosen.dtype))
        block = chosen.span.stop
    return tuple(drawn)


async def run_elsewhere(
    hop: Hop,
    spec: ModelSpec,
    record: HopRecord,
    history: History,
    *,
    after: Sequence[Hop] = (),
    host_config: HostConfig,
    timeout_s: float,
    on_work: Callable[[float], None] = lambda _: None,
) -> HopRecord:
    """Output of `hop` for the same inputs, with its own receipts.

    Args:
        after: Hops for the blocks behind it, to which its outputs go as in any other session.
        on_work: Told how long all hops of such a session worked on it, seconds.

    Raises:
        PeerError: It cannot be reached, refuses, fails, or takes longer than `timeout_s`.
    """
    try:
        with trio.fail_after(timeout_s):
            async with open_host(new_identity(), host_config) as host:
                try:
                    return await _run_over(host, hop, after, spec, record, history, on_work)
                except PeerError as exc:
                    if exc.peer_id == hop.peer_id or not after:
                        raise
                    # One of those behind it has failed, which is not what was asked.
                    return await _run_over(host, hop, (), spec, record, history, on_work)
    except trio.TooSlowError as exc:
        raise PeerError(f"no second opinion in {timeout_s:g} s", hop.peer_id) from exc


async def _run_over(
    host: Host,
    hop: Hop,
    after: Sequence[Hop],
    spec: ModelSpec,
    record: HopRecord,
    history: History,
    on_work: Callable[[float], None],
) -> HopRecord:
    """Record of `hop`, which is given the inputs of `history`."""
    inputs = history.inputs
    opening = open_session(
        host,
        Route((hop, *after)),
        spec,
        max_tokens=min(len(inputs) + ASKED_TOKENS, max(len(inputs), spec.max_positions)),
        codec=record.codec,
        config=SessionConfig(),
        keep_steps=True,
    )
    async with opening as session:
        if after:
            # The hop in question signs for all rows, and its successor has them.
            prompt = max(1, len(inputs) - DECODED_TOKENS)
            await session.prefill(inputs[:prompt], 0)
            for position in range(prompt, len(inputs)):
                await session.decode(inputs[position : position + 1], position)
        else:
            position = 0
            for chunk in torch.split(inputs, SessionConfig().chunk_tokens):
                await session.decode(chunk, position)
                position += len(chunk)
        error = await session.settle()
        if error is not None:
            raise error
    assert session.book is not None
    on_work(session.book.work_s)
    collected = await collect_record(
        host,
        session.book.kept,
        hop.peer_id,
        spec.hidden_size,
        max_bytes=2 * len(inputs) * row_bytes(spec.hidden_size, record.codec),
        max_tokens=len(inputs),
    )
    if collected.record is None:
        raise ProtocolViolation("a second opinion without its evidence", hop.peer_id)
    return collected.record


def _trust(view: ReputationView, peer_id: str) -> float:
    """In steps, so that chance decides among those about alike."""
    return round(view.score(peer_id).integrity, 1)
