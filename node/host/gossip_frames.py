"""Reduction of a gossip frame to what has an effect: the last word about each topic, of topics of ours.

Thousands of grafts, prunes and subscriptions fit one frame of libp2p's, each of them well-formed, and each
costs its receiver a hundred times what it costs its sender. A neighbour that means them sends one of each for
a topic, and is in 65 topics at most. What names other topics would only be remembered: libp2p keeps a
back-off for every name that it is told. Addresses of other peers, which a prune may bring, are dropped: they
would be dialled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Final

from libp2p.pubsub.pb import rpc_pb2

MAX_ENTRIES: Final = 256  # of one kind in a frame; of a kind with more, all are left out
MAX_MESSAGES: Final = 200  # in a frame
MAX_IDS: Final = 256  # of messages that a neighbour has, for one topic
MAX_WANTED: Final = 64  # of messages that a neighbour wants
MAX_STRANGE: Final = 4  # grafts for topics that we are not in: each is answered with a prune
MAX_BACK_OFF_S: Final = 600  # for how long a neighbour may keep us from grafting it again


def reduce_frame(rpc: Any, joined: Collection[str], is_ours: Callable[[str], bool]) -> None:
    """Leave out of a frame what has no effect, or no good one.

    Args:
        rpc: The frame, which is changed.
        joined: Topics that we are in.
        is_ours: Whether a topic is one of p2pinfer's.
    """
    del rpc.publish[MAX_MESSAGES:]
    _replace(rpc.subscriptions, _last(rpc.subscriptions, "topicid", is_ours))
    if rpc.HasField("control"):
        _reduce_control(rpc.control, joined, is_ours)


def _reduce_control(control: Any, joined: Collection[str], is_ours: Callable[[str], bool]) -> None:
    grafts = _last(control.graft, "topicID", is_ours)
    strange = [each for each in grafts if each.topicID not in joined]
    _replace(control.graft, [each for each in grafts if each.topicID in joined] + strange[:MAX_STRANGE])
    _replace(control.prune, _last(control.prune, "topicID", joined.__contains__))
    for prune in control.prune:
        del prune.peers[:]
        prune.backoff = min(prune.backoff, MAX_BACK_OFF_S)
    _replace(control.ihave, _last(control.ihave, "topicID", joined.__contains__))
    for ihave in control.ihave:
        del ihave.messageIDs[MAX_IDS:]
    wanted = _unique(control.iwant)
    del control.iwant[:]
    if wanted:
        control.iwant.append(rpc_pb2.ControlIWant(messageIDs=wanted))
    del control.idontwant[MAX_STRANGE:]
    for idontwant in control.idontwant:
        del idontwant.messageIDs[MAX_WANTED:]


def _last(entries: Any, topic: str, is_of_interest: Callable[[str], bool]) -> list[Any]:
    """The last entry for each topic of interest; none of them if there are far too many."""
    if len(entries) > MAX_ENTRIES:
        return []
    return list({name: each for each in entries if is_of_interest(name := getattr(each, topic))}.values())


def _unique(iwants: Any) -> list[Any]:
    ids: dict[Any, None] = {}
    for iwant in iwants[:MAX_ENTRIES]:
        ids.update(dict.fromkeys(iwant.messageIDs[:MAX_WANTED]))
        if len(ids) >= MAX_WANTED:
            break
    return list(ids)[:MAX_WANTED]


def _replace(entries: Any, kept: Iterable[Any]) -> None:
    kept = list(kept)
    if len(kept) != len(entries):
        copies = [type(each)() for each in kept]
        for copy, each in zip(copies, kept, strict=True):
            copy.CopyFrom(each)
        del entries[:]
        entries.extend(copies)
