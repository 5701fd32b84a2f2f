"""Terms of a session, which every hop of it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.numerics import Codec, packed_row_bytes, row_bytes
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.draws import Draw, decode_draws, encode_ids
from p2pinfer.node.protocol.messages import Step
from p2pinfer.reputation.receipt import Payload
from p2pinfer.routing.route import Hop, Route

if TYPE_CHECKING:
    from torch import Tensor

# What goes into the first hop: (tokens, hidden_size), or the ids of so many tokens.
Inputs: TypeAlias = "Tensor | tuple[int, ...]"


AT_ONCE: Final = 2  # adapters that a client brings at once: each takes a training session on every hop


class SessionAdapter(Protocol):
    """Adapter of one session, which its client brings to every hop."""

    def revision(self, revision: str, span: BlockSpan) -> str:
        """The model with the adapter, as sessions and receipts of these blocks name it."""
        ...

    def brought(self, hops: Sequence[Hop], codec: Codec) -> AbstractAsyncContextManager[None]:
        """Have the adapter at each hop for as long as the block runs, in which the session is opened.

        Raises:
            PeerError: A hop takes none, or not this one.
        """
        ...


@dataclass(frozen=True, slots=True)
class KeptSession:
    """A session that is over, whose cache its hops were asked to keep.

    Attributes:
        session: Its name.
        tokens: Positions of it that are of interest, from 0 on.
        packed: How many of its positions travelled packed.
    """

    session: bytes
    route: Route
    codec: Codec
    tokens: int
    packed: int = 0

    def common(self, tokens: int, packed: int) -> int:
        """Number of positions, of `tokens`, in common with a session that packs `packed` of them."""
        return tokens if packed == self.packed else min(tokens, packed, self.packed)


@dataclass(frozen=True, slots=True)
class Packing:
    """Wish to have a prompt travel packed.

    Attributes:
        tokens: Positions from 0 on; 0: none.
        if_slow: Only if they would take long over the line from here.
    """

    tokens: int = 0
    if_slow: bool = False


PLAIN: Final = Packing()


@dataclass(frozen=True, slots=True)
class SessionTerms:
    """Terms that every hop of one session is asked for.

    Attributes:
        session: The session's random 16-byte name.
        codec: The dtype in which hidden states travel, unless they are packed.
        max_tokens: Positions that every hop reserves.
        adapter: Low-rank updates of the model for this session; None: there are none.
        draw: How the last hop draws tokens, of which the first one gets the ids; None: hidden states go in
            and come out.
        packed: Positions below this one travel packed to every hop, from the client too unless it sends ids.
    """

    session: bytes
    spec: ModelSpec
    codec: Codec
    max_tokens: int
    adapter: SessionAdapter | None = None
    draw: Draw | None = None
    packed: int = 0

    def revision(self, span: BlockSpan) -> str:
        """The model with the adapter, as a hop of these blocks is asked for it."""
        revision = self.spec.revision
        return revision if self.adapter is None else self.adapter.revision(revision, span)

    def adapter_at(self, hops: Sequence[Hop]) -> AbstractAsyncContextManager[None]:
        """Have the adapter at each hop, if there is one, for as long as the block runs."""
        return nullcontext() if self.adapter is None else self.adapter.brought(hops, self.codec)

    @property
    def row_bytes(self) -> int:
        """Bytes of one position's hidden state where it is not packed."""
        return row_bytes(self.spec.hidden_size, self.codec)

    def sent_row_bytes(self, position: int) -> int:
        """Bytes of one position's hidden state as it travels."""
        return packed_row_bytes(self.spec.hidden_size) if position < self.packed else self.row_bytes

    def pieces(self, start: int, stop: int, tokens: int) -> Iterator[tuple[int, int]]:
        """Positions `start` to `stop - 1` in pieces of `tokens` at most, of which none is packed in part."""
        while start < stop:
            end = min(start + tokens, stop)
            end = min(end, self.packed) if start < self.packed else end
            yield start, end
            start = end

    def as_sent(self, step: Step, payload: Payload) -> Payload:
        """Payload of a step as it travels to the first hop."""
        if step.kept or step.position >= self.packed or self.draw is not None:
            return b"" if step.kept else payload
        from p2pinfer.node.protocol.tensors import pack_hidden  # torch, which whoever has rows has imported

        return pack_hidden(payload, step.tokens, self.codec)

    def format(self) -> Format:
        """Format of what goes in and what comes out."""
        width, vocab_size = self.spec.hidden_size, self.spec.vocab_size
        if self.draw is not None:
            logprobs = self.draw.logprobs
            return Format(encode_ids, partial(decode_draws, vocab_size=vocab_size, logprobs=logprobs))
        # torch, which whoever has hidden states to send has imported already
        from p2pinfer.node.protocol.tensors import decode_hidden, encode_hidden, round_hidden

        return Format(
            partial(encode_hidden, codec=self.codec),
            partial(decode_hidden, hidden_size=width, codec=self.codec),
            lambda inputs: round_hidden(inputs, self.codec)[0],
        )


@dataclass(frozen=True, slots=True)
class Format:
    """Codec of one session's payloads.

    Attributes:
        encode: Gives the payload of inputs.
        decode: Gives hidden states, or `Draws`, of a payload, the number of its positions, and `peer_id`.
        round: Gives the payload of inputs that are rounded to travel packed; None: they do not.
    """

    encode: Callable[[Any], bytes]
    decode: Callable[..., Any]
    round: Callable[[Any], bytes] | None = None

    def encode_at(self, inputs: Any, *, is_packed: bool) -> bytes:
        """Payload of inputs that travel packed, or not."""
        return self.round(inputs) if is_packed and self.round is not None else self.encode(inputs)
