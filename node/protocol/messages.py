"""Messages of a session, and their msgpack encoding.

A message is a msgpack array whose first element names it; `frames` says how it travels.

What a peer sends is checked here before anything else sees it: every field's type and range before a message
exists. Whatever fails is a `ProtocolViolation`.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from p2pinfer.models.numerics import Codec

from .draws import Draw

SESSION_PROTOCOL: Final = "/p2pinfer/session/2.0.0"  # client and hop: a session, its steps, its results
# The same with receipts that name no other hop's: whoever asks for it is told why it is not served.
FORMER_SESSION_PROTOCOL: Final = "/p2pinfer/session/1.0.0"
CHAIN_PROTOCOL: Final = "/p2pinfer/chain/1.0.0"  # hop -> its successor: carries steps

RefusalCode: TypeAlias = Literal[
    "cache_full",  # no room for the session's KV cache or replay log
    "wrong_model",  # another revision is served here
    "wrong_span",  # these blocks are not held here
    "busy",  # too many sessions, of this client or of all
    "over_share",  # this client holds as much of the cache or the replay log as one may
    "leaving",  # the node is shutting down
    "no_session",  # the session to attach to is not known, or not yours
    "successor_unreachable",  # the next hop could not be dialled, or did not let us attach
    "successor_vanished",  # the next hop is gone in the middle of the session
    "no_replay",  # the replay log does not reach back as far as was asked
    "lease_expired",  # the session was idle too long
    "wrong_input",  # a tensor came in that is not finite
    "protocol",  # a frame that the protocol does not allow
    "compute",  # the span could not be computed
]

SessionId: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
PeerIdText: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
# Strangers' words end up on terminals: no control characters.
Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=1024, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
Block: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
MAX_COUNT: Final = (1 << 32) - 1
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Positional on the wire; fields that a later minor version appends are skipped by an older reader."""


class Successor(msgspec.Struct, frozen=True, array_like=True):
    """Destination of a hop's output: a peer, and the addresses it is said to answer at."""

    peer_id: PeerIdText
    addrs: Annotated[tuple[Text, ...], msgspec.Meta(max_length=16)] = ()


class Prefix(msgspec.Struct, frozen=True, array_like=True):
    """Beginning of an earlier session of the same client, which this hop was asked to keep."""

    session: SessionId
    tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 24)]


class Open(_Message, frozen=True, tag="open"):
    """Client to every hop, first on a session stream: reserve a session on `[start, stop)`.

    `predecessor` names the only peer whose chain stream may feed this session; None is the client itself,
    on this stream. `successor` None means: answer to the client, on this stream. `prefix` is what the session
    begins with, as far as the hop still has it.

    With `tokens` the client's steps bring token ids, which the first hop embeds. With `draw` the last hop
    answers with draws instead of hidden states (see `draws`).

    Hidden states of positions below `packed` travel packed to every hop (see `tensors`), and count as what
    they are when they are unpacked: in caches, logs, digests and evidence. No step is on both sides of it.
    """

    session: SessionId
    revision: Annotated[str, msgspec.Meta(max_length=64)]
    start: Block
    stop: Block
    max_tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 24)]
    codec: Codec
    predecessor: PeerIdText | None = None
    successor: Successor | None = None
    prefix: Prefix | None = None
    tokens: bool = False
    draw: Draw | None = None
    packed: Count = 0


class Opened(_Message, frozen=True, tag="opened"):
    """Hop to client: cache reserved, successor attached; steps may come, within these limits."""

    dtype: Annotated[str, msgspec.Meta(max_length=16)]  # the hop's numerics, as text
    max_chunk_tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)] = 1024  # tokens in one step
    max_steps_in_flight: Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)] = 16  # steps without a result
    max_bytes_in_flight: Annotated[int, msgspec.Meta(ge=1, le=1 << 62)] = 64 << 20  # of their hidden states
    prefix: Count = 0  # positions of the session that are in the cache already
    keeps_s: Count = 0  # how long the hop keeps a session's cache that ends with `keep`, seconds
    ends: bool = False  # the hop embeds, or draws, as it was asked
    successor_us: Count = 0  # round trip to the successor, microseconds; 0: not known
    pass_us: Count = 0  # what the session's blocks take for a chunk of a prompt, microseconds, and
    token_ns: Count = 0  # for each of its tokens, nanoseconds; both 0: not known


class Move(_Message, frozen=True, tag="move"):
    """Client to hop, first on a session stream: a session of mine goes on here instead of where it began.

    Sent while none of its steps is under way. The hop answers `Moved` and says `End` on the former stream.
    """

    session: SessionId


class Moved(_Message, frozen=True, tag="moved"):
    """Hop to client: go on."""


class Attach(_Message, frozen=True, tag="attach"):
    """Predecessor to hop, first on a chain stream: what follows belongs to this session."""

    session: SessionId


class Attached(_Message, frozen=True, tag="attached"):
    """Hop to predecessor: go on."""


class Bill(msgspec.Struct, frozen=True, array_like=True):
    """Time that one hop spent on one step, in microseconds, and the number of tokens in its batch."""

    queue_us: Count
    compute_us: Count
    serve_us: Count  # from the frame's arrival to the moment its output was ready to send, all included
    batch_tokens: Count


Bills: TypeAlias = Annotated[tuple[Bill, ...], msgspec.Meta(max_length=256)]
Receipts: TypeAlias = Annotated[
    tuple[Annotated[bytes, msgspec.Meta(max_length=1024)], ...], msgspec.Meta(max_length=256)
]


class Step(_Message, frozen=True, tag="step"):
    """Work for a hop: `tokens` hidden states for positions `position`, `position + 1`, ...

    A position below the cache's length rolls the cache back to it. A step of a higher `epoch` supersedes the
    queued steps of lower ones that begin at or after its position: they are dropped unread.

    With `replay` it only fills caches and replay logs, of as many hops, the receiver being the first: nobody
    answers it with a `Result`, but the last of them says `Filled`.

    With `kept` it has no payload: its positions are of the prefix that all hops have said to have, and each
    signs for what it took in and gave out there. No other step may come before it.
    """

    number: Count
    epoch: Count
    position: Count
    tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 20)]
    returns: Count  # how many of the last positions the client wants back from the last hop
    bills: Bills = ()
    receipts: Receipts = ()
    replay: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0
    kept: bool = False


class Filled(_Message, frozen=True, tag="filled"):
    """Hop to whoever fed it: a step with `replay` is in the caches of all hops it was meant for."""

    number: Count


class Result(_Message, frozen=True, tag="result"):
    """Last hop to client: the hidden states of a step's last `tokens` positions, after every block.

    In a session that draws, the payload has the `Draws` of these positions, for which `drawn` is signed.
    """

    number: Count
    epoch: Count
    tokens: Count
    bills: Bills = ()
    receipts: Receipts = ()
    drawn: Annotated[bytes, msgspec.Meta(max_length=64)] = b""


class Refused(_Message, frozen=True, tag="refused"):
    """Instead of `Opened` or `Attached`, or in the middle of a session that cannot go on."""

    code: RefusalCode
    message: Text
    peer_id: Annotated[str, msgspec.Meta(max_length=128)] = ""  # the peer it is about, if another one
    fits: Count = 0  # tokens of a session that would be let in instead; 0: none, or not known


class Expect(_Message, frozen=True, tag="expect"):
    """Client to hop: let this peer attach as well. With its first step of its own, others are cut off."""

    predecessor: PeerIdText


class Relink(_Message, frozen=True, tag="relink"):
    """Client to hop: stand ready to send to `successor`, and send it positions `[start, stop)` of the log.

    They go as steps of `epoch` with `replay`, of at most `chunk_tokens` each, no more than `window` of them
    not `Filled` yet; a link to that peer is made unless there is one. With `switch` the link then takes the
    place of the former one, and steps of lower epochs are not sent on any more.
    """

    number: Count
    successor: Successor
    start: Count
    stop: Count
    replay: Annotated[int, msgspec.Meta(ge=1, le=256)]
    epoch: Count
    switch: bool
    chunk_tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 20)] = 256
    window: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8


class Relinked(_Message, frozen=True, tag="relinked"):
    """Hop to client: done, or the reason why not.

    Without `switch` everything replayed has been `Filled`; with it, everything has been sent.
    """

    number: Count
    problem: RefusalCode | None = None


class Probe(_Message, frozen=True, tag="probe"):
    """Client to hop, and hop to successor: are you there? The event loop answers, whatever is computed.

    A hop that is asked by its client asks its successor in turn, and waits `within_ms` for the answer.
    """

    number: Count
    within_ms: Annotated[int, msgspec.Meta(ge=0, le=60_000)] = 0


class Alive(_Message, frozen=True, tag="alive"):
    """The answer to `Probe`, and whether the hop's successor answers; None where there is none to ask."""

    number: Count
    successor: bool | None = None


class Leaving(_Message, frozen=True, tag="leaving"):
    """Hop to client: this node stops in so many seconds; have another one take over."""

    seconds: Annotated[float, msgspec.Meta(ge=0, le=3600)]


class End(_Message, frozen=True, tag="end"):
    """Last message on a stream. With `keep`, the client may open a session that begins like this one."""

    keep: bool = False


Message: TypeAlias = (
    Open
    | Opened
    | Move
    | Moved
    | Attach
    | Attached
    | Step
    | Filled
    | Result
    | Refused
    | Expect
    | Relink
    | Relinked
    | Probe
    | Alive
    | Leaving
    | End
)

encode_message: Final = msgspec.msgpack.Encoder().encode  # a step should not pay for a function around it
_decoder: Final[msgspec.msgpack.Decoder[Message]] = msgspec.msgpack.Decoder(Message)
decode_message: Final = _decoder.decode  # raises one of `MALFORMED` for what is no message
MALFORMED: Final = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


def printable(text: str) -> str:
    """`text` as a message may carry it: one line, no control characters, not too long."""
    return "".join(each if each.isprintable() else " " for each in text)[:1024]
