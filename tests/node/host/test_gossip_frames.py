"""What is left of a gossip frame that was made to cost its receiver time."""

from __future__ import annotations

from libp2p.pubsub.pb import rpc_pb2

from p2pinfer.node.host.gossip_frames import MAX_ENTRIES, MAX_IDS, MAX_MESSAGES, MAX_WANTED, reduce_frame
from p2pinfer.node.swarm.gossipsub import is_topic, topic_of

OURS, LEFT = topic_of("a" * 32), topic_of("b" * 32)


def reduced(rpc: rpc_pb2.RPC) -> rpc_pb2.RPC:
    reduce_frame(rpc, {OURS}, is_topic)
    again = rpc_pb2.RPC()
    again.ParseFromString(rpc.SerializeToString())
    return again


def test_what_a_neighbour_says_once_stays_as_it_is() -> None:
    rpc = rpc_pb2.RPC()
    rpc.publish.add().data = b"announcement"
    rpc.subscriptions.add(subscribe=True, topicid=OURS)
    rpc.control.graft.add().topicID = OURS
    rpc.control.ihave.add(topicID=OURS, messageIDs=[b"aa", b"bb"])
    rpc.control.iwant.add(messageIDs=[b"cc"])
    before = rpc.SerializeToString()
    reduce_frame(rpc, {OURS}, is_topic)
    assert rpc.SerializeToString() == before


def test_of_many_words_about_a_topic_the_last_counts() -> None:
    rpc = rpc_pb2.RPC()
    for number in range(100):
        rpc.subscriptions.add(subscribe=number % 2 == 0, topicid=OURS)
        rpc.control.graft.add().topicID = OURS
        rpc.control.prune.add(topicID=OURS, backoff=number)
    rpc = reduced(rpc)
    assert [each.subscribe for each in rpc.subscriptions] == [False]
    assert [each.topicID for each in rpc.control.graft] == [OURS]
    assert [each.backoff for each in rpc.control.prune] == [99]


def test_a_frame_of_thousands_is_left_out() -> None:
    rpc = rpc_pb2.RPC()
    for _ in range(MAX_ENTRIES + 1):
        rpc.subscriptions.add(subscribe=True, topicid=OURS)
        rpc.control.graft.add().topicID = OURS
        rpc.control.prune.add().topicID = OURS
        rpc.control.ihave.add(topicID=OURS)
    for _ in range(MAX_MESSAGES + 1):
        rpc.publish.add().data = b"x"
    rpc = reduced(rpc)
    assert not (rpc.subscriptions or rpc.control.graft or rpc.control.prune or rpc.control.ihave)
    assert len(rpc.publish) == MAX_MESSAGES


def test_topics_that_somebody_invents_are_not_remembered() -> None:
    """A back-off was kept for every name that a prune brought."""
    rpc = rpc_pb2.RPC()
    for number in range(50):
        rpc.subscriptions.add(subscribe=True, topicid=f"invented/{number}")
        rpc.control.prune.add(topicID=f"invented/{number}", backoff=1 << 60)
        rpc.control.graft.add().topicID = f"invented/{number}"
        rpc.control.graft.add().topicID = topic_of(f"{number:032x}")
    rpc.control.prune.add(topicID=LEFT)
    rpc.control.prune.add(topicID=OURS, backoff=1 << 60)
    rpc = reduced(rpc)
    assert not rpc.subscriptions
    assert [(each.topicID, each.backoff) for each in rpc.control.prune] == [(OURS, 600)]
    assert len(rpc.control.graft) == 4  # a neighbour may not know yet that we have left its topic


def test_nobody_is_dialled_because_a_prune_names_it() -> None:
    rpc = rpc_pb2.RPC()
    prune = rpc.control.prune.add(topicID=OURS)
    prune.peers.add(peerID=b"victim", signedPeerRecord=b"record")
    assert not reduced(rpc).control.prune[0].peers


def test_messages_are_asked_for_once_and_few_at_a_time() -> None:
    rpc = rpc_pb2.RPC()
    for number in range(20):
        rpc.control.iwant.add(messageIDs=[b"%d" % number] * 50 + [b"%d" % each for each in range(40)])
    rpc.control.ihave.add(topicID=OURS, messageIDs=[b"%d" % each for each in range(5000)])
    rpc.control.idontwant.add(messageIDs=[b"%d" % each for each in range(5000)])
    rpc = reduced(rpc)
    (iwant,) = rpc.control.iwant
    assert len(iwant.messageIDs) == len(set(iwant.messageIDs)) <= MAX_WANTED
    assert [len(each.messageIDs) for each in rpc.control.ihave] == [MAX_IDS]
    assert [len(each.messageIDs) for each in rpc.control.idontwant] == [MAX_WANTED]
