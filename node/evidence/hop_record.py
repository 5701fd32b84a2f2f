"""Record of one hop in one session: its receipts and the tensors they name, ready to be recomputed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Final

from p2pinfer.errors import ProtocolViolation, WrongOutput
from p2pinfer.models.checkpoint.spec import MARK
from p2pinfer.models.numerics import (
    Codec,
    Numerics,
    is_packed,
    parse_numerics,
    row_bytes,
    unpacked_codec,
)
from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.receipt import Payload, Receipt, standing_steps

if TYPE_CHECKING:
    from torch import Tensor

    from p2pinfer.models.learning.adapter import Adapter

MAX_TOKENS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class HopRecord:
    """A hop's receipts of a session, in order, and payloads by digest.

    Every payload has the digest that it stands under; who makes a record sees to that.

    Attributes:
        adapter: What the receipts' revision names beside the model, if it is at hand.
    """

    peer_id: str
    signed: tuple[bytes, ...]
    receipts: tuple[Receipt, ...]
    contents: Mapping[bytes, Payload]
    adapter: Adapter | None = None

    @property
    def is_adapted(self) -> bool:
        """True if the receipts are of the model with an adapter."""
        return MARK in self.revision

    @property
    def is_whole(self) -> bool:
        """True if no receipt is missing in between. Otherwise it is no proof for others."""
        return len(self.receipts) == self.receipts[-1].sequence + 1

    @property
    def span(self) -> BlockSpan:
        """Span that the hop was to run."""
        return BlockSpan(self.receipts[0].start, self.receipts[0].stop)

    @property
    def revision(self) -> str:
        """Revision of the model."""
        return self.receipts[0].revision

    @property
    def numerics(self) -> Numerics | None:
        """Numerics that the hop names; None if this version does not know them."""
        return parse_numerics(self.receipts[0].dtype)

    @property
    def codec(self) -> Codec:
        """Codec of the payloads."""
        return unpacked_codec(self.receipts[0].codec)

    @property
    def hidden_size(self) -> int:
        """Values of one position's hidden state, by the first input's size; `history_of` checks the rest."""
        first = self.receipts[0]
        return len(self.contents.get(first.input, b"")) // max(1, first.tokens) // row_bytes(1, self.codec)


@dataclass(frozen=True, slots=True)
class History:
    """Steps that stand at a session's end, without those that were rolled back.

    Attributes:
        inputs: (tokens, hidden_size), of the positions 0, 1, ...
        outputs: (n, hidden_size), what the hop gave for `positions`.
        positions: Ascending; all of them but on a route's last hop.
        packed: Positions of outputs that were rounded to be packed.
    """

    inputs: Tensor
    outputs: Tensor
    positions: tuple[int, ...]
    packed: frozenset[int] = frozenset()


def history_of(record: HopRecord, hidden_size: int, *, max_tokens: int = MAX_TOKENS) -> History:
    """Put a record together; of more than `max_tokens` positions the first, which depend on no later one.

    A few receipts may name one payload many times, so what they come to has to be bounded. Of what was rolled
    back nothing is looked at, and nothing has to be there.

    Raises:
        ProtocolViolation: Payloads are missing or of another size, or positions were left out.
        WrongOutput: An output is not finite; no honest hop signs for that.
    """
    row = row_bytes(hidden_size, record.codec)
    inputs, outputs = _Pieces(row), _Pieces(row)
    packed = set[int]()
    stop = 0
    for receipt in record.receipts:
        if receipt.position > stop:
            raise ProtocolViolation(f"nothing is known of position {stop}", record.peer_id)
        stop = receipt.position + receipt.tokens
    for standing in standing_steps(record.receipts):
        receipt, end = standing.receipt, standing.receipt.position + standing.receipt.tokens
        if receipt.position >= max_tokens:
            break
        for pieces, digest, rows in (
            (inputs, receipt.input, receipt.tokens),
            (outputs, receipt.output, receipt.returned),
        ):
            content = memoryview(record.contents.get(digest, b"") if rows else b"")
            if len(content) != rows * row:
                raise ProtocolViolation(f"{len(content)} bytes where {rows} rows are due", record.peer_id)
            pieces.add(end - rows, min(standing.stop, max_tokens), content)
        if is_packed(receipt.codec):
            packed.update(range(end - receipt.returned, min(standing.stop, max_tokens)))
    try:
        given = inputs.decode(hidden_size, record.codec)
    except WrongOutput as exc:
        raise ProtocolViolation(f"an input that cannot be: {exc}", record.peer_id) from exc
    got = outputs.decode(hidden_size, record.codec, record.peer_id)
    return History(given, got, outputs.positions, frozenset(packed))


class _Pieces:
    """Rows of a session's first positions, as they came."""

    def __init__(self, row: int) -> None:
        self._row = row
        self._pieces: list[tuple[int, int, memoryview]] = []

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(chain.from_iterable(range(start, stop) for start, stop, _ in self._pieces))

    def add(self, start: int, stop: int, content: memoryview) -> None:
        """Add positions `start` to `stop` - 1, with which `content` begins; harmless if there are none."""
        if start < stop:
            self._pieces.append((start, stop, content[: (stop - start) * self._row]))

    def decode(self, hidden_size: int, codec: Codec, peer_id: str = "") -> Tensor:
        """(rows, hidden_size) float32."""
        from p2pinfer.node.protocol.tensors import (
            decode_hidden,
        )  # torch: an audit needs it, a record does not

        tokens = sum(stop - start for start, stop, _ in self._pieces)
        joined = bytearray().join(content for _, _, content in self._pieces)
        return decode_hidden(joined, tokens, hidden_size, codec, peer_id).float()
