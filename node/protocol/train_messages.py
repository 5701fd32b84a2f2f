"""Messages of training: forward and backward passes of microbatches through one hop's blocks.

    client ──begin, adapt, forward, backward──> hop
    hop ──begun, adapted, forwarded, backwarded, declined──> client

Every request but the first has a number, and its answer, which may come in any order, has the same one. As in
`messages`, every field's type and range is checked before a message exists.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from p2pinfer.models.numerics import Codec

from .messages import Block, Count, SessionId, Text

TRAIN_PROTOCOL: Final = "/p2pinfer/train/1.0.0"  # client and hop: passes of microbatches
MAX_UPDATES: Final = 4096  # low-rank updates of one adapter, on one hop
MAX_SEQUENCES: Final = 4096  # sequences of one microbatch

DeclineCode: TypeAlias = Literal[
    "wrong_model",  # another revision is served here
    "wrong_span",  # these blocks are not held here
    "not_admitted",  # this node does not serve this client
    "busy",  # too many sessions or passes, of this client or of all
    "leaving",  # the node is shutting down
    "too_large",  # a microbatch or an adapter beyond this hop's limits
    "wrong_adapter",  # an adapter that does not fit these blocks, or is not what its digest says
    "adapter_gone",  # the adapter that is named is not held here: send it again
    "inputs_gone",  # the inputs of that forward pass are not kept any more: send them again
    "wrong_input",  # a tensor that is not finite, or positions that make no sense
    "idle",  # no request for too long
    "compute",  # the pass could not be computed
]

Digest: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Lengths: TypeAlias = Annotated[
    tuple[Annotated[int, msgspec.Meta(ge=1, lt=1 << 20)], ...],
    msgspec.Meta(min_length=1, max_length=MAX_SEQUENCES),
]
Receipt: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=1024)]


class _TrainMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Positional on the wire; fields that a later minor version appends are skipped by an older reader."""


class Begin(_TrainMessage, frozen=True, tag="begin"):
    """Client to hop, first on the stream: passes through blocks among `[start, stop)` will come."""

    session: SessionId
    revision: Annotated[str, msgspec.Meta(max_length=64)]
    start: Block
    stop: Block
    codec: Codec  # of hidden states and their gradients


class Begun(_TrainMessage, frozen=True, tag="begun"):
    """Hop to client: go on, within these limits."""

    dtype: Annotated[str, msgspec.Meta(max_length=16)]  # the hop's numerics, as text
    max_tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)]  # in one microbatch
    max_in_flight: Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]  # requests without an answer
    max_adapter_bytes: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
    max_rank: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]


class Update(msgspec.Struct, frozen=True, array_like=True):
    """One low-rank update of an adapter; see `models.learning.adapter.LowRank`."""

    block: Block
    projection: Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"\A[a-z_.]*\Z")]
    rank: Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]
    scale: Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0


Updates: TypeAlias = Annotated[tuple[Update, ...], msgspec.Meta(max_length=MAX_UPDATES)]


class Adapt(_TrainMessage, frozen=True, tag="adapt"):
    """Client to hop: keep this adapter, whose float32 values are the payload, for passes that name it."""

    number: Count
    digest: Digest  # see `digest_of_adapter`
    updates: Updates
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)] = 0


class Adapted(_TrainMessage, frozen=True, tag="adapted"):
    """Hop to client: it is kept; the one before it still is, and none before that."""

    number: Count


class Forward(_TrainMessage, frozen=True, tag="forward"):
    """Client to hop: run `[start, stop)` on sequences with these lengths; the payload is their inputs.

    Inputs are the positions and the indices of all tokens, 32-bit each, then their hidden states.
    """

    number: Count
    start: Block
    stop: Block
    lengths: Lengths
    adapter: Digest | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0  # of dropout; 0: none
    keeps: bool = True  # a backward pass will follow


class Forwarded(_TrainMessage, frozen=True, tag="forwarded"):
    """Hop to client: done; the payload is the hidden states after the blocks."""

    number: Count
    receipt: Receipt


class Backward(_TrainMessage, frozen=True, tag="backward"):
    """Client to hop: gradients of a microbatch; the payload is the gradient of its output.

    With `sends_inputs` the inputs, as in `Forward`, precede it. Else those of forward pass `forward` are
    meant, which are dropped with the answer.
    """

    number: Count
    forward: Count
    start: Block
    stop: Block
    lengths: Lengths
    adapter: Digest | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0
    sends_inputs: bool = False
    wants_hidden: bool = True  # the gradient of the input is wanted


class Backwarded(_TrainMessage, frozen=True, tag="backwarded"):
    """Hop to client: done; the payload is the gradients of input (if wanted) and adapter (float32)."""

    number: Count
    receipt: Receipt


class Forget(_TrainMessage, frozen=True, tag="forget"):
    """Client to hop: the inputs of that forward pass are not needed. There is no answer."""

    forward: Count


class Declined(_TrainMessage, frozen=True, tag="declined"):
    """Hop to client: no. Without a number it is about the session, which ends."""

    code: DeclineCode
    message: Text
    number: Count | None = None


class Done(_TrainMessage, frozen=True, tag="done"):
    """Last message on a stream, from either side."""


TrainMessage: TypeAlias = (
    Begin | Begun | Adapt | Adapted | Forward | Forwarded | Backward | Backwarded | Forget | Declined | Done
)
WITH_PAYLOAD: Final = (Adapt, Forward, Forwarded, Backward, Backwarded)

_decoder: Final[msgspec.msgpack.Decoder[TrainMessage]] = msgspec.msgpack.Decoder(TrainMessage)
decode_train_message: Final = _decoder.decode  # raises one of `messages.MALFORMED` for what is none
