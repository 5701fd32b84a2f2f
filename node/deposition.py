"""What one hop did in one session, as its receipts and the tensors that they name; ready to be run again."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pinfer.errors import ProtocolViolation, WrongOutput
from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.receipt import Payload, Receipt

from .tensors import decode_hidden, dtype_of
from .wire import Codec


@dataclass(frozen=True, slots=True)
class Deposition:
    """A hop's receipts of a session, in order, and payloads by digest.

    Every payload has the digest that it stands under; who makes a deposition sees to that.
    """

    peer_id: str
    signed: tuple[bytes, ...]
    receipts: tuple[Receipt, ...]
    contents: Mapping[bytes, Payload]

    @property
    def span(self) -> BlockSpan:
        """What the hop was to run."""
        return BlockSpan(self.receipts[0].start, self.receipts[0].stop)

    @property
    def codec(self) -> Codec:
        """How the payloads are written."""
        return self.receipts[0].codec


@dataclass(frozen=True, slots=True)
class History:
    """What stands at a session's end, whatever was rolled back on the way.

    Attributes:
        inputs: (tokens, hidden_size), of the positions 0, 1, ...
        outputs: (n, hidden_size), what the hop gave for `positions`.
        positions: Ascending; all of them but on a route's last hop.
    """

    inputs: Tensor
    outputs: Tensor
    positions: tuple[int, ...]

    def first(self, tokens: int) -> History:
        """The beginning of it, which does not depend on what came after."""
        if len(self.inputs) <= tokens:
            return self
        kept = bisect_left(self.positions, tokens)
        return History(self.inputs[:tokens], self.outputs[:kept], self.positions[:kept])


def history_of(deposition: Deposition, hidden_size: int) -> History:
    """Put a deposition together.

    Raises:
        ProtocolViolation: Payloads are missing or of another size, or positions were left out.
        WrongOutput: An output is not finite; no honest hop signs for that.
    """
    inputs: list[Tensor] = []  # one row each
    outputs: dict[int, Tensor] = {}
    codec, peer_id = deposition.codec, deposition.peer_id
    for receipt in deposition.receipts:
        if receipt.position > len(inputs):
            raise ProtocolViolation(f"nothing is known of position {len(inputs)}", peer_id)
        del inputs[receipt.position :]
        for position in [each for each in outputs if each >= receipt.position]:
            del outputs[position]
        try:
            rows = _rows(deposition.contents, receipt.input, receipt.tokens, hidden_size, codec)
        except WrongOutput as exc:
            raise ProtocolViolation(f"an input that cannot be: {exc}", peer_id) from exc
        inputs += rows.unbind()
        given = _rows(deposition.contents, receipt.output, receipt.returned, hidden_size, codec)
        first = len(inputs) - receipt.returned
        outputs.update(zip(range(first, len(inputs)), given.unbind(), strict=True))
    positions = tuple(sorted(outputs))
    return History(
        _stacked(inputs, hidden_size, codec),
        _stacked([outputs[position] for position in positions], hidden_size, codec),
        positions,
    )


def _rows(
    contents: Mapping[bytes, Payload], digest: bytes, tokens: int, hidden_size: int, codec: Codec
) -> Tensor:
    content = contents.get(digest, b"") if tokens else b""
    return decode_hidden(bytearray(content), tokens, hidden_size, codec)


def _stacked(rows: Sequence[Tensor], hidden_size: int, codec: Codec) -> Tensor:
    return torch.stack(list(rows)).float() if rows else torch.empty(0, hidden_size, dtype=dtype_of(codec))
