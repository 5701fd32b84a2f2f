"""Announcer of a node: announces its span at once when something changed, else periodically."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import trio

from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.compute.runner import SpanRunner
from p2pinfer.models.configs.numbers import MAX_NUMBERS
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.protocol.messages import printable
from p2pinfer.node.swarm.membership import SwarmMember
from p2pinfer.routing.announcement import MAX_ADDRS, MAX_NAME, MAX_TTL_S, Announcement, OfferedAdapter

from .decode_speed import DecodeSpeed

TOPIC_PER_S: Final = 10.0  # announcements of all of a model's peers together, when nothing changes


def announce_interval_s(peers: int, config: ServeConfig) -> float:
    """The seconds between announcements where so many peers announce: the more they are, the rarer each."""
    return max(config.announce_interval_s, peers / TOPIC_PER_S)


def announce_ttl_s(peers: int, config: ServeConfig) -> float:
    """Lifetime of an announcement: it outlives as many intervals, however long they are."""
    stretched = announce_interval_s(peers, config) / config.announce_interval_s
    return min(config.announce_ttl_s * stretched, MAX_TTL_S)


class Announcer:
    """One served span as the swarm hears of it."""

    def __init__(
        self,
        member: SwarmMember,
        spec: ModelSpec,
        runner: SpanRunner,
        speed: DecodeSpeed,
        config: ServeConfig,
        *,
        has_ends: bool = False,
        adapters: tuple[OfferedAdapter, ...] = (),
    ) -> None:
        self._member = member
        self._spec = spec
        self._runner = runner
        self._speed = speed
        self._config = config
        self._has_ends = has_ends
        self._adapters = adapters
        self._touched = trio.Event()
        self._moved = trio.Event()
        self._announced_free = -1
        self._announced_speed = speed.tokens_per_s
        # Tokens that a session may come to have.
        self.free_tokens: Callable[[], int] = lambda: runner.cache.free_tokens

    def touch(self) -> None:
        """Something changed; worth an announcement if it is much."""
        free, total = self.free_tokens(), self._runner.cache.capacity_tokens
        if abs(free - self._announced_free) > total // 8 or self._speed.differs(self._announced_speed):
            self._touched.set()

    def _move(self) -> None:
        """We are reached elsewhere than we said: worth an announcement at once."""
        self._moved.set()
        self._touched.set()

    def announcement(self) -> Announcement:
        """Announcement as of this moment."""
        announces_numbers = len(self._spec.numbers) <= MAX_NUMBERS
        duplicates = self._member.duplicates
        return Announcement(
            peer_id=self._member.peer_id,
            model=printable(self._spec.model)[:MAX_NAME] or "?",  # a folder may be called anything
            revision=self._spec.revision,
            span=self._runner.span,
            dtype=str(self._runner.numerics),
            tokens_per_s=self._speed.tokens_per_s,
            free_cache_tokens=self.free_tokens(),
            sequence=self._member.sequence.next(),
            reachability=self._member.reach.reachability.kind,
            nat=self._member.reach.reachability.nat,
            addrs=self._member.addrs[:MAX_ADDRS],  # a machine with many networks has more
            coordinate=self._member.coordinate,
            ttl_s=announce_ttl_s(self._peers(), self._config),
            weights=self._spec.weights if announces_numbers else "",
            numbers=self._spec.numbers if announces_numbers else "",
            num_blocks=self._spec.num_blocks,
            instance=duplicates.instance,
            uptime_s=duplicates.uptime_s,
            twin=duplicates.suspect,
            ends=self._has_ends,
            name=self._config.public_name,
            adapters=self._adapters,
            packs=True,
        )

    def _peers(self) -> int:
        return len(self._member.announcements(self._spec.revision))

    async def announce(self) -> None:
        """Tell the swarm."""
        self._touched, self._moved = trio.Event(), trio.Event()
        await self._member.sequence.keep_reserved()
        announcement = self.announcement()
        self._announced_free = announcement.free_cache_tokens
        self._announced_speed = announcement.tokens_per_s
        await self._member.announce(announcement)

    async def withdraw(self) -> None:
        """Say goodbye, unless another process goes on under our identity: it would be taken for gone."""
        if self._member.duplicates.taken.is_set():
            return
        await self._member.announce(replace(self.announcement(), leaving=True))

    async def keep_fresh(self) -> None:
        """Announce on change and once an interval, never more often than the minimal gap."""
        with self._member.reach.telling(self._move), self._member.disputed(self._move):
            while True:
                with trio.move_on_after(self._config.announce_min_gap_s):
                    await self._moved.wait()
                interval_s = announce_interval_s(self._peers(), self._config)
                with trio.move_on_after(interval_s - self._config.announce_min_gap_s):
                    await self._touched.wait()
                await self.announce()
