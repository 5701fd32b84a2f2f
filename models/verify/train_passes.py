"""Recomputation of a pass of training, to measure how far a peer's outputs or gradients lie from it.

As for sessions (`verify.py`), the span runs in float32 and twice in bfloat16, and the distance of these runs
is the unit. A backward pass is measured twice over: the gradient of the hidden states token by token, as
outputs are, and that of the adapter tensor by tensor, by the length of the difference. The gradient of a
matrix is a sum over all tokens, in which rounding averages out and altered weights do not.

A tensor's unit is at least the rounding of two values a block, `2^-8 / sqrt(12)` of the tensor's length each,
so that two runs which happen to round as float32 does make no unit of zero.

In a mixture the bfloat16 runs go to the experts that the float32 run chooses. Tokens whose router hangs
between two experts are left out, and others are judged by what does not depend on a single token: a swap
reaches them through attention. On the way back it reaches the tokens before it in full, since their gradient
is a sum over all that attended to them: they are left out as well. Every gradient of the adapter is a sum
over all tokens. So a further run has each of those tokens go to its other expert, and how far that moves a
token or a tensor is the least unit of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from p2pinfer.models.compute.blocks import Blocks
from p2pinfer.models.learning.rows import Rows
from p2pinfer.models.learning.span_passes import Microbatch, SpanPasses, complete

from .deviation import Deviation, PassDeviation, TensorDeviation
from .noise_floor import NoiseFloor, carried_square, carried_unit, faint_tokens, measure_floor
from .reference import Reference
from .verify import check_rows, describe_chunk, split_chunks

_ROUNDING: Final = 2.0**-8 / 12**0.5  # of a bfloat16, in the root mean square, as a part of its value
_LARGEST: Final = 1e7  # value of a pass that can be judged; trained models reach 1e5
_FAINT: Final = 1e-24  # length of a gradient that processors may take for zero
_FAINT_PART: Final = 2.0**-16  # of the largest token's gradient, which float16 has to full precision
_TIED: Final = 8.0  # roundings of a router's score within which a token may have gone to another expert


@dataclass(frozen=True, slots=True)
class TrainedPass:
    """A pass as it was asked for, all tensors on the CPU.

    Attributes:
        batch: Blocks, sequences, adapter, seed of dropout.
        hidden: (tokens, hidden_size), what went in.
        gradient: (tokens, hidden_size), of the output; None: a forward pass.
        wants_hidden: The gradient of the input was asked for.
    """

    batch: Microbatch
    hidden: Tensor
    gradient: Tensor | None = None
    wants_hidden: bool = True


@dataclass(frozen=True, slots=True)
class _Run:
    """Results of a pass: what came out of the blocks, the gradients of hidden states and adapter."""

    output: Tensor
    hidden: Tensor | None
    vector: Tensor | None


@dataclass(frozen=True, slots=True)
class PassFloor:
    """A pass that was run again, in float32 and as an honest peer might.

    Attributes:
        outputs: Effect of rounding on what the blocks give.
        judged: The same of what came back: outputs, or the gradient of the inputs; None if that is not due.
        given: (tokens, hidden_size), what `judged` is to be compared with.
        vector: (size,), the gradient of the adapter; None where none is due.
        near: The same of the runs that round.
        swapped: The same where every token that hangs between two experts goes to the other one; None where
            there is no such token.
        doubtful: Tokens whose router hangs between two experts, or whose input dtypes do not round alike;
            of a backward pass also those before the former in their sequence.
    """

    asked: TrainedPass
    outputs: NoiseFloor
    judged: NoiseFloor | None
    given: Tensor
    vector: Tensor | None
    near: Sequence[Tensor]
    swapped: Tensor | None
    doubtful: frozenset[int]


def rerun_pass(reference: Reference, asked: TrainedPass, wire_dtype: torch.dtype) -> PassFloor:
    """Run a pass in float32 and as an honest peer might.

    Args:
        reference: Of any blocks that include those of the pass.
        wire_dtype: What the wire carried.

    Raises:
        ValueError: The pass itself overflows.
    """
    tokens, size = asked.batch.rows.tokens, reference.spec.hidden_size
    choice = _FixedChoice()
    carried = torch.zeros(tokens, size)
    exact = _run(reference.exact.choosing(choice).parts, asked, torch.float32, carried)
    rounded: list[_Run] = []
    for runner in reference.rounded:
        choice.begin_again()
        rounded.append(_run(runner.choosing(choice).parts, asked, wire_dtype))
    results = [each for run in (exact, *rounded) for each in (run.output, run.hidden, run.vector)]
    # Whoever asked for a pass chose inputs and adapter, and may have chosen them so that this happens.
    if not all(bool((each.abs() < _LARGEST).all()) for each in results if each is not None):
        raise ValueError("the pass itself overflows")
    rows, tied, swapped = asked.batch.rows, choice.tied(tokens), None
    if tied:
        choice.begin_again(swaps=True)
        swapped = _run(reference.exact.choosing(choice).parts, asked, torch.float32)
    outputs = _floor_of(asked.hidden, exact.output, [each.output for each in rounded], carried, rows)
    if swapped is not None:
        outputs = _reached_by(outputs, swapped.output)
    judged: NoiseFloor | None = outputs
    given = asked.hidden
    if asked.gradient is not None:
        given, judged = asked.gradient, None
        near = [each.hidden for each in rounded if each.hidden is not None]
        if exact.hidden is not None:
            judged = _floor_of(given, exact.hidden, near, None, rows)
            if swapped is not None and swapped.hidden is not None:
                judged = _reached_by(judged, swapped.hidden)
        tied = _up_to(rows, tied)
    vectors = [each.vector for each in rounded if each.vector is not None]
    moved = None if swapped is None else swapped.vector
    doubtful = tied | faint_tokens(asked.hidden)
    return PassFloor(asked, outputs, judged, given, exact.vector, vectors, moved, doubtful)


def compare_pass(
    floor: PassFloor, hidden: Tensor | None, vector: Tensor | None, peer_id: str = ""
) -> PassDeviation:
    """Deviation of what a peer gave from a pass that was run again.

    Args:
        hidden: (tokens, hidden_size): outputs, or the gradient of the inputs; None where none was due.
        vector: (size,), the gradient of the adapter; None where none was due.

    Raises:
        WrongOutput: The results are misshapen, not finite or absurdly large.
    """
    asked, rows = floor.asked, floor.asked.batch.rows
    is_backward = asked.gradient is not None
    others = _other_tokens(rows, floor.doubtful)
    found: Deviation | None = None
    roughness = _roughness(asked.hidden, floor.outputs, others)
    if hidden is not None and floor.judged is not None:
        checked = check_rows(hidden, rows.tokens, hidden.shape[-1], peer_id)
        found = _deviation(floor.judged, checked, rows, floor.doubtful, skips_nothing=not is_backward)
        roughness = max(roughness, _roughness(floor.given, floor.judged, others))
    tensors: tuple[TensorDeviation, ...] = ()
    if vector is not None and floor.vector is not None:
        tensors = tuple(_tensors(floor, floor.vector, vector.float()))
        roughness = max(roughness, _vector_roughness(floor))
    return PassDeviation(
        found,
        tensors,
        alike=floor.outputs.alike(others) if len(others) > 1 else 1.0,
        tokens=len(others),
        roughness=roughness,
        doubtful=len(floor.doubtful),
        is_backward=is_backward,
    )


def _run(
    parts: Sequence[Blocks], asked: TrainedPass, wire_dtype: torch.dtype, carried: Tensor | None = None
) -> _Run:
    """One run; with `carried`, the rounding of what each block gives is added to it."""
    passes, batch = SpanPasses(*parts), _on(parts[0], asked.batch)
    forwarded = complete(passes.forward(batch, asked.hidden))
    if carried is not None:
        for each in (*forwarded.inputs[1:], forwarded.output):
            carried += carried_square(each.float().cpu())
    output = forwarded.output.cpu().to(wire_dtype).float()
    if asked.gradient is None:
        return _Run(output, None, None)
    gradients = complete(
        passes.backward(batch, forwarded.inputs, asked.gradient, wants_hidden=asked.wants_hidden)
    )
    hidden = None if gradients.hidden is None else gradients.hidden.cpu().to(wire_dtype).float()
    return _Run(output, hidden, None if gradients.adapter is None else gradients.adapter.cpu())


def _on(blocks: Blocks, batch: Microbatch) -> Microbatch:
    adapter = None if batch.adapter is None else batch.adapter.to(blocks.device)
    return replace(batch, rows=batch.rows.to(blocks.device), adapter=adapter)


# ---------------------------------------------------------------------- hidden states


def _floor_of(
    given: Tensor, exact: Tensor, rounded: Sequence[Tensor], carried: Tensor | None, rows: Rows
) -> NoiseFloor:
    """The floor of all tokens, whose scale and usual distance are those of the sequences' later tokens."""
    given = given.float()
    usual = [0, *_other_tokens(rows, frozenset()).tolist()]
    part = measure_floor(
        given[usual],
        exact[usual],
        [each[usual] for each in rounded],
        None if carried is None else carried[usual],
    )
    distances = torch.stack([((each - exact) / part.scale).norm(dim=-1) for each in rounded])
    squares = carried_square(exact) if carried is None else carried
    return NoiseFloor(
        exact,
        rounded,
        part.scale,
        distances.square().mean(0).sqrt(),
        part.least,
        carried_unit(squares, part.scale),
    )


def _reached_by(floor: NoiseFloor, swapped: Tensor) -> NoiseFloor:
    """The floor of tokens that swaps may have reached: at least as far as all swaps together move them."""
    moved = ((swapped - floor.exact) / floor.scale).norm(dim=-1)
    return replace(floor, distance=torch.maximum(floor.distance, moved))


def _deviation(
    floor: NoiseFloor, found: Tensor, rows: Rows, doubtful: frozenset[int], *, skips_nothing: bool
) -> Deviation:
    """Deviation of the tokens of all sequences; their first ones, which are like no others, apart."""
    firsts = _first_tokens(rows)
    is_first = torch.zeros(len(found), dtype=torch.bool)
    is_first[firsts] = True
    # Of a token that no loss depends on there is no gradient, and next to none of others: dtypes lose what
    # lies far below the largest values, and whoever trains chooses those.
    speaks = torch.ones(len(found), dtype=torch.bool)
    if not skips_nothing:
        sizes = torch.maximum(floor.exact.norm(dim=-1), found.norm(dim=-1))
        largest = float(floor.exact.norm(dim=-1).max())
        speaks = sizes >= max(largest * _FAINT_PART, _FAINT)
        speaks[sorted(doubtful)] = False  # rather than undecided: they may be most tokens of a chunk
    places = torch.where(~is_first & speaks)[0]
    floor = replace(floor, undecided=doubtful)
    rho = floor.deviations(found, torch.arange(len(found))).norm(dim=-1)
    known = [each for each in firsts if bool(speaks[each]) and each not in doubtful]
    first = max((float(rho[each]) for each in known), default=None)
    chunks = []
    for part in split_chunks(0, len(places)):
        at = places[part]
        chunk = describe_chunk(floor, at.tolist(), floor.deviations(found[at], at))
        chunks.append(replace(chunk, clouded=bool(doubtful)))
    return Deviation(tuple(chunks), first)


def _first_tokens(rows: Rows) -> list[int]:
    starts, at = [], 0
    for length in rows.lengths:
        starts.append(at)
        at += length
    return starts


def _up_to(rows: Rows, tokens: frozenset[int]) -> frozenset[int]:
    """These tokens, and those before them in their sequences."""
    found: set[int] = set()
    for start, length in zip(_first_tokens(rows), rows.lengths, strict=True):
        last = max((each for each in tokens if start <= each < start + length), default=start - 1)
        found.update(range(start, last + 1))
    return frozenset(found)


def _other_tokens(rows: Rows, doubtful: frozenset[int]) -> Tensor:
    """Places of tokens that are neither the first of their sequence nor in doubt."""
    out = {*_first_tokens(rows), *doubtful}
    return torch.tensor([each for each in range(rows.tokens) if each not in out], dtype=torch.long)


# ---------------------------------------------------------------------- the adapter


def _tensors(floor: PassFloor, right: Tensor, got: Tensor) -> Iterator[TensorDeviation]:
    """Deviation of the gradient of each A, B and prompt of the blocks that were run."""
    adapter, span = floor.asked.batch.adapter, floor.asked.batch.span
    assert adapter is not None
    least = _ROUNDING * (2 * len(span)) ** 0.5
    whole = float(right.norm())
    inside = torch.zeros(len(right), dtype=torch.bool)
    for name, where in adapter.places(span):
        inside[where] = True
        expected = right[where]
        usual = torch.stack([(each[where] - expected).norm() for each in floor.near]).square().mean().sqrt()
        # Where nothing is due, such as for an A whose B is zero, as good as nothing has to come.
        unit = max(float(usual), least * float(expected.norm()), 1e-6 * least * whole, _FAINT)
        if floor.swapped is not None:
            unit = max(unit, float((floor.swapped[where] - expected).norm()))
        yield TensorDeviation(name, float((got[where] - expected).norm()) / unit)
    if bool((got[~inside] != 0).any()):
        yield TensorDeviation("blocks that were not run", float("inf"))


# ---------------------------------------------------------------------- what rounding decides


def _roughness(given: Tensor, floor: NoiseFloor, others: Tensor) -> float:
    """Part of what the blocks do to a usual token that rounding decides."""
    if not len(others):
        return 0.0
    added = ((floor.exact - given.float()) / floor.scale).norm(dim=-1)[others]
    typical = float(added.median())
    return float(floor.distance[others].median()) / typical if typical else 0.0


def _vector_roughness(floor: PassFloor) -> float:
    """Part of the adapter's gradient that rounding decides."""
    if floor.vector is None or not (length := float(floor.vector.norm())):
        return 0.0
    return max(float((each - floor.vector).norm()) for each in floor.near) / length


class _FixedChoice:
    """`ExpertChoice` of one microbatch: each block's first choice is kept, whichever run asks later."""

    def __init__(self) -> None:
        self._chosen: dict[int, Tensor] = {}
        self._scores: dict[int, Tensor] = {}
        self._others: dict[int, list[Tensor]] = {}
        self._asked: set[int] = set()
        self._swaps = False

    def begin_again(self, *, swaps: bool = False) -> None:
        """Another run of the same microbatch begins; with `swaps`, tied tokens go to the other expert."""
        self._asked.clear()
        self._swaps = swaps

    def choose(self, block: int, scores: Tensor, count: int) -> Tensor:
        """See `ExpertChoice`."""
        if block not in self._chosen:
            self._chosen[block] = scores.topk(count, dim=-1).indices
            self._scores[block] = scores.detach().cpu()
        elif self._swaps:
            return self._swapped(block)
        elif block not in self._asked:
            self._others.setdefault(block, []).append(scores.detach().cpu())
        self._asked.add(block)
        return self._chosen[block]

    def tied(self, tokens: int) -> frozenset[int]:
        """Tokens whose choice rounding may have made otherwise somewhere."""
        found = torch.zeros(tokens, dtype=torch.bool)
        for block in self._scores:
            found |= self._tied_in(block)
        return frozenset(torch.where(found)[0].tolist())

    def _tied_in(self, block: int) -> Tensor:
        """(tokens,) bool: those whose choice in this block is as close as rounding."""
        scores, others = self._scores[block], self._others.get(block, [])
        count = self._chosen[block].shape[-1]
        if not others or count >= scores.shape[-1]:
            return torch.zeros(len(scores), dtype=torch.bool)
        noise = torch.stack([(each - scores).square().mean() for each in others]).mean().sqrt()
        best = scores.topk(count + 1, dim=-1).values
        return best[:, count - 1] - best[:, count] < _TIED * noise * 2**0.5

    def _swapped(self, block: int) -> Tensor:
        """The choice, with the next best expert in place of the last one where they are tied."""
        chosen, tied = self._chosen[block].clone(), self._tied_in(block)
        count = chosen.shape[-1]
        if bool(tied.any()):
            tied = tied.to(chosen.device)
            following = self._scores[block].topk(count + 1, dim=-1).indices[:, count].to(chosen.device)
            chosen[tied, count - 1] = following[tied]
        return chosen
