"""Census of the peers that serve a model: those that answer, each as fast as can be believed.

A node goes where the swarm is weakest. If it believed what is announced, one invented peer that claims half
of the blocks at a million tokens a second would send every volunteer to the other half. So a peer counts once
it has proved its key here; those that have not are called on, a few at a time and for the weakest block
first, since what nobody serves and what nobody known serves look alike. Nobody here has measured how fast
another peer is: it counts as no faster than this node would be. A slow node errs by that, by no more than its
own speed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from p2pinfer.node.swarm.membership import SwarmMember
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.hearsay import in_turns

CALLS: Final = 8  # peers called on at a time
ROUNDS: Final = 4
ROUND_S: Final = 2.0  # for an answer


async def take_census(
    member: SwarmMember, revision: str, num_blocks: int, tokens_per_s_per_block: float
) -> list[Announcement]:
    """Announcements of others that may be counted on when blocks are chosen.

    Args:
        tokens_per_s_per_block: Speed of this node if it held a single block.
    """
    for _ in range(ROUNDS):
        heard = [each for each in in_turns(member.hearsay(revision)) if each.peer_id != member.peer_id]
        counted = [each for each in heard if _counts(member, each)]
        weakest = _weakest(counted, num_blocks)
        due = [
            each
            for each in heard
            if not _has_answered(member, each)
            and not member.presence.is_silent(each)
            and each.span.start <= weakest < each.span.stop
        ]
        if not due:
            break
        await member.presence.call(due[:CALLS], ROUND_S)
    return [_believable(each, tokens_per_s_per_block) for each in heard if _counts(member, each)]


def _counts(member: SwarmMember, peer: Announcement) -> bool:
    return _has_answered(member, peer) and not member.presence.is_silent(peer)


def _has_answered(member: SwarmMember, peer: Announcement) -> bool:
    return member.host.connection_kind(peer.peer_id) is not None or member.has_met(peer.peer_id)


def _weakest(peers: list[Announcement], num_blocks: int) -> int:
    """The block that the fewest of the peers serve."""
    served = [sum(each.span.start <= block < each.span.stop for each in peers) for block in range(num_blocks)]
    return served.index(min(served))


def _believable(peer: Announcement, tokens_per_s_per_block: float) -> Announcement:
    return replace(peer, tokens_per_s=min(peer.tokens_per_s, tokens_per_s_per_block / len(peer.span)))
