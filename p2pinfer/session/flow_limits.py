"""Negotiated flow limits: chunk size and steps in flight, within what every hop accepts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from p2pinfer.node.protocol.messages import Opened
from p2pinfer.node.transport.line_rate import NO_LINE, Line

CHUNK_S: Final = 0.25  # of the line to the first hop, for one chunk at most
PIECES: Final = 6  # of a prompt, for each hop, where nobody says what a chunk costs there
AHEAD: Final = 8  # times what the line now takes until a result is back: a fresh connection becomes faster
MOST_CHUNK_S: Final = 4.0  # where round trips are so long that shorter chunks would leave the line idle
MIN_WAIT_S: Final = 0.01  # shorter ones are for a turn of the event loop
# Of the first chunk on a line of unknown rate, which is what a thin one's router holds, and on a long one.
FIRST_BYTES: Final = 8 << 10
FIRST_WINDOW_BYTES: Final = 14 << 10  # that TCP sends before it hears anything, also after a pause
MOST_GROWTH_BYTES: Final = 16 << 10  # of the next chunk on such a line
PAGE_TOKENS: Final = 64  # of a hop's cache, unless its operator chose otherwise
LEAST_TOKENS: Final = 4  # fewer cost more in computation than they save
LEAST_PIECE_TOKENS: Final = 16  # the same where only hops behind the first one would have had to wait
# Nodes hang up on whoever sends to them at less than twice this rate (`serve.min_bytes_per_s`).
LEAST_BYTES_PER_S: Final = 8 << 10


@dataclass(frozen=True, slots=True)
class FlowLimits:
    """Chunks of a prompt, and how many of them may be under way.

    Attributes:
        chunk_tokens: Of the longest chunk.
        chunks_in_flight: How many such chunks may be.
        steps_in_flight: How many may be if they are shorter, of `bytes_in_flight` together.
    """

    chunk_tokens: int
    chunks_in_flight: int
    steps_in_flight: int
    bytes_in_flight: int


def agree(chunk_tokens: int, chunks_in_flight: int, row_bytes: int, hops: Iterable[Opened]) -> FlowLimits:
    """The most that neither the client's own wishes nor any hop's limits forbid; at least a token at a time.

    Args:
        row_bytes: Of one token's hidden state as it travels.
    """
    limits = list(hops)
    most_bytes = min(hop.max_bytes_in_flight for hop in limits)
    tokens = min(chunk_tokens, most_bytes // row_bytes, *(hop.max_chunk_tokens for hop in limits))
    tokens = max(tokens, 1)
    steps = max(1, min(chunks_in_flight, *(hop.max_steps_in_flight for hop in limits)))
    in_flight = min(steps, most_bytes // (tokens * row_bytes))
    return FlowLimits(tokens, max(in_flight, 1), steps, max(most_bytes, row_bytes))


def replay_limit_s(positions: int, row_bytes: int, hops: int, base_s: float) -> float:
    """Seconds that a replay may take, whatever its lines: each hop is fed by another one, or by the client.

    Args:
        row_bytes: Size of one token's hidden state as it travels.
        hops: How many are fed.
        base_s: For what takes time beside that.
    """
    return base_s + positions * row_bytes * hops / LEAST_BYTES_PER_S


def common_prefix(hops: Iterable[Opened], asked: int) -> int:
    """Positions with which a session can begin on all of these hops, at most `asked`."""
    found = {min(hop.prefix, asked) for hop in hops}
    # Who has more goes on from here in a page that others read as well, unless a page begins here.
    return min(found) if len(found) == 1 else min(found) // PAGE_TOKENS * PAGE_TOKENS


class PassCost(NamedTuple):
    """Seconds that a hop takes for a chunk: `fixed_s`, and `token_s` for each of its tokens."""

    fixed_s: float
    token_s: float

    def seconds(self, tokens: int) -> float:
        """For a chunk of so many tokens."""
        return self.fixed_s + tokens * self.token_s


def pass_costs(hops: Iterable[Opened]) -> list[PassCost]:
    """Costs that the hops have told; empty if one of them told none."""
    costs = [PassCost(hop.pass_us / 1e6, hop.token_ns / 1e9) for hop in hops]
    return costs if all(cost.fixed_s or cost.token_s for cost in costs) else []


def pipeline_s(tokens: int, chunk_tokens: int, row_s: float, costs: Sequence[PassCost]) -> float:
    """Seconds until a prompt in chunks of one length has passed all hops, and before each of them a line.

    Every stage has the first chunk once, and the longest one has each of the others after it.

    Args:
        row_s: Of a token's row on a line.
    """
    passes_s = [cost.seconds(chunk_tokens) for cost in costs]
    line_s = chunk_tokens * row_s
    chunks = -(-tokens // chunk_tokens)
    return len(costs) * line_s + sum(passes_s) + (chunks - 1) * max(line_s, *passes_s)


class ChunkSizes:
    """Sizes of a prompt's chunks, as long as the line to the first hop takes for `CHUNK_S`, or shorter.

    A hop computes a chunk when it has all of it. On a line of 1 Mbit/s, 256 tokens of 1,280 bytes take 2.6 s,
    in which the next hop would have nothing to do, and its own line would be idle. What one chunk takes on a
    line is added to the prompt's time once for each hop. A hop reads all its weights for a chunk of any
    length, so many short ones cost more than few long ones. Where hops say what they take for a chunk, it is
    as long as is best for the prompt (`pipeline_s`), if all lines are like the first; elsewhere it is cut
    into `PIECES` for each hop.

    TCP begins with `FIRST_WINDOW_BYTES` a round trip and doubles them each time, also after a pause. On a
    line that is long enough for that to last, the first chunks are short and double as well: the lines behind
    the first one begin at about the same time as it, not one after the other.

    Over a long way chunks are longer: all that may be in flight have to last until the first one's result is
    back. At 800 ms one way that is 2.4 s over two hops, in which eight chunks of 0.25 s leave the line idle.
    The rate of a young connection is `AHEAD` times as high by then, because TCP doubles it every round trip.

    A rate that was measured too high is believed step by step: no chunk is over twice as long as the longest
    before it. One of 230 KB on a line of 31 KB/s is seven seconds in which no ping comes through.
    """

    def __init__(
        self,
        agreed: FlowLimits,
        row_bytes: int,
        way_s: float = 0.0,
        *,
        tokens: int = 0,
        hops: int = 1,
        costs: Sequence[PassCost] = (),
    ) -> None:
        """Sizes for one prompt.

        Args:
            row_bytes: Size of one token's hidden state as it travels.
            way_s: Seconds until a result is back, by the distance alone.
            tokens: Of the prompt; 0: not known.
            hops: That it passes.
            costs: What each of them takes for a chunk; empty: not known.
        """
        self._most = agreed.chunk_tokens
        self._in_flight = agreed.steps_in_flight
        self._row_bytes = row_bytes
        self._way_s = way_s
        self._tokens = tokens
        self._hops = hops
        self._costs = costs if tokens else ()
        # Of as many chunks the shortest ones are best.
        self._lengths = [
            each for each in range(1, min(tokens, self._most) + 1) if -(-tokens // -(-tokens // each)) == each
        ]
        # Of the line, for one chunk.
        self._least_s = min(AHEAD * way_s / agreed.steps_in_flight, MOST_CHUNK_S)
        self._chunk_s = max(CHUNK_S, self._least_s)
        self._stalls = 1  # a power of two
        self._first_bytes = FIRST_BYTES
        self._longest = 0  # chunk so far, in tokens

    def next_tokens(self, line: Line) -> int:
        """Tokens of the next chunk."""
        if line.is_local or line == NO_LINE:
            return self._most
        piece = self._piece(line)
        if line.bytes_per_s:
            tokens = min(self._tokens_in(line, self._chunk_s), piece)
            if not self._longest and line.bytes_per_s * line.rtt_s > FIRST_WINDOW_BYTES and self._hops > 1:
                tokens = min(tokens, FIRST_BYTES // self._row_bytes)
        else:  # nobody had to wait: the line has taken all chunks so far, and may take longer ones
            tokens = min(self._first_bytes // self._row_bytes, piece)
            self._first_bytes += min(self._first_bytes, MOST_GROWTH_BYTES)
        tokens = min(tokens, 2 * self._longest or tokens)
        tokens = max(1, min(max(tokens, LEAST_TOKENS), self._most))
        self._longest = max(self._longest, tokens)
        return tokens

    def _piece(self, line: Line) -> int:
        """The length that is best for the hops."""
        row_s = self._row_bytes / line.bytes_per_s if line.bytes_per_s else 0.0
        if self._costs:
            lasting = [each for each in self._lengths if self._lasts(each, row_s)]
            best = min(
                lasting or [self._most], key=lambda each: pipeline_s(self._tokens, each, row_s, self._costs)
            )
            return self._stalls * best
        # The first hop alone has the line to itself, and shorter chunks would cost it more than they save.
        if not self._tokens or self._hops == 1 or not row_s:
            return self._most
        piece = max(LEAST_PIECE_TOKENS, self._tokens // (PIECES * self._hops))
        return max(self._stalls * piece, self._tokens_in(line, self._least_s))

    def _lasts(self, tokens: int, row_s: float) -> bool:
        """True if what may be in flight lasts until a result is back, on the line or at the slowest hop."""
        passes_s = [cost.seconds(tokens) for cost in self._costs]
        back_s = self._way_s + len(passes_s) * tokens * row_s + sum(passes_s)
        return self._in_flight * max(passes_s) >= back_s or tokens * row_s >= self._least_s

    def _tokens_in(self, line: Line, seconds: float) -> int:
        return int(line.bytes_per_s * seconds) // self._row_bytes

    def note_stall(self, waited_s: float, line: Line) -> None:
        """Hear that all chunks that may be in flight were; take longer ones if the line ran dry meanwhile.

        Args:
            waited_s: Until the first one's result was back.
            line: As it was then.
        """
        is_dry = waited_s > MIN_WAIT_S and not line.queued_bytes
        if is_dry or waited_s > line.queue_s + CHUNK_S:
            self._chunk_s = min(2 * self._chunk_s, MOST_CHUNK_S)
            self._stalls *= 2
