"""Recomputation of a span, to measure how far a peer's outputs lie from it.

The whole session goes through in one pass of pieces, as prompts do, in float32 and twice in bfloat16, which
costs a small part of what decoding it token by token did. Nothing here judges: `reputation.verdict` does, and
`node.verify` puts the two together.

What is compared are numbers as they were on the wire, so the rounded runs are put through the codec. Of
outputs that were packed (`packed_rows`), nobody but their sender knows what was rounded to those integers.
They, and the rounded runs, count as the nearest to the exact run of all rows that would be packed like that:
what the rounding to integers may explain speaks for nobody and against nobody.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from p2pinfer.errors import WrongOutput
from p2pinfer.models.span import BlockSpan

from .deviation import HIGH_RHO, ChunkDeviation, Deviation, LogitDeviation
from .experts import Paths, RoutingLog, Run, draw_unseen, explain, router_noise, swayed_noise, tied_tokens
from .logits import LogitEffect, measure_effect
from .noise_floor import NoiseFloor, measure_floor, shared_part
from .packed_outputs import packed_mask, rounded_where, unpacked_towards
from .reference import Reference, Tail
from .sessions import run_session, run_sessions

CHUNK_TOKENS = 32
_UPPER = 0.9
_DRAWS = 6  # of choices for tokens that are not seen
# Trained models reach 1e5. Far from overflow even when squared, divided and summed up.
_ABSURD = 1e8


def check_rows(rows: Tensor, tokens: int, hidden_size: int, peer_id: str = "") -> Tensor:
    """`rows` as float32, if they can be reckoned with: (tokens, hidden_size), finite, of a sane size.

    Raises:
        WrongOutput: They cannot.
    """
    if rows.shape != (tokens, hidden_size) or not rows.is_floating_point():
        raise WrongOutput(
            f"hidden states of shape {tuple(rows.shape)} where ({tokens}, {hidden_size}) is due", peer_id
        )
    rows = rows.detach().to("cpu", torch.float32)
    largest = float(rows.abs().max()) if tokens else 0.0  # NaN if there is one
    if not largest <= _ABSURD:
        raise WrongOutput(f"hidden states with a value of {largest:g}", peer_id)
    return rows


def check_positions(positions: Sequence[int] | None, tokens: int) -> list[int]:
    """Positions of outputs, ascending; those of all `tokens` inputs if None.

    Raises:
        ValueError: They are not the inputs'.
    """
    at = list(range(tokens)) if positions is None else list(positions)
    if at != sorted(set(at)) or (at and not 0 <= at[0] <= at[-1] < tokens):
        raise ValueError(f"outputs for positions that the {tokens} inputs have not")
    return at


def measure_span(
    reference: Reference,
    span: BlockSpan,
    inputs: Tensor,
    outputs: Tensor,
    *,
    wire_dtype: torch.dtype,
    positions: Sequence[int] | None = None,
    packed: frozenset[int] = frozenset(),
    tail: Tail | None = None,
    is_enough: Callable[[Deviation], bool] = lambda _: False,
    peer_id: str = "",
) -> Deviation:
    """Measure how far a session's outputs lie from the span's.

    The same tensors give the same numbers on the same machine with the same number of threads.

    Args:
        span: What the peer ran; among the reference's blocks.
        inputs: (tokens, hidden_size), all that the span was given from position 0 on, as decoded.
        outputs: (n, hidden_size), what it gave, as decoded.
        wire_dtype: What the wire carried.
        positions: Those of the outputs, ascending; None if they are those of the inputs.
        packed: Those of outputs that were packed.
        tail: What follows `span`. If that has blocks, it needs all outputs.
        is_enough: Whether the logits need not be looked at any more, which takes longest.

    Raises:
        ValueError: The inputs cannot be run, or the positions are not theirs.
        WrongOutput: The outputs are misshapen, not finite or absurdly large.
    """
    at = check_positions(positions, len(inputs))
    outputs = check_rows(outputs, len(at), reference.spec.hidden_size, peer_id)
    floor = rerun(reference, span, inputs, wire_dtype, packed).explaining(outputs, at)
    deviation = compare(floor, outputs, at)
    if tail is None or is_enough(deviation):
        return deviation
    return compare(floor, outputs, at, tail)


def rerun(
    reference: Reference,
    span: BlockSpan,
    inputs: Tensor,
    wire_dtype: torch.dtype,
    packed: frozenset[int] = frozenset(),
) -> NoiseFloor:
    """Run `span` over a session, in float32 and as an honest peer might.

    Outputs of the positions in `packed` travel packed. The floor keeps the reference, which serves to run the
    session again where experts were chosen otherwise.

    Raises:
        ValueError: The inputs cannot be run.
    """
    tokens = len(inputs)
    if not 1 <= tokens <= reference.max_tokens:
        raise ValueError(f"{tokens} tokens cannot be run again; 1 to {reference.max_tokens} can")
    try:
        inputs = check_rows(inputs, tokens, reference.spec.hidden_size)
    except WrongOutput as exc:
        raise ValueError(f"the inputs cannot be: {exc}") from exc
    with torch.inference_mode():
        return _Rerun(reference, span, inputs, wire_dtype, packed).floor()


class _Rerun:
    """Runs of one session, under any choices of experts."""

    def __init__(
        self,
        reference: Reference,
        span: BlockSpan,
        inputs: Tensor,
        wire_dtype: torch.dtype,
        packed: frozenset[int],
    ) -> None:
        self._packed = packed_mask(packed, range(len(inputs)))
        self._reference = reference
        self._span = span
        self._inputs = inputs
        self._wire_dtype = wire_dtype

    def floor(self) -> NoiseFloor:
        floor, exact, rounded = self._measure({})
        if not self._reference.exact.has_experts:
            return floor

        def explain_outputs(outputs: Tensor, positions: Sequence[int]) -> NoiseFloor:
            with torch.inference_mode():
                return self._explain(floor, exact, rounded, outputs, positions)

        return replace(floor, explain=explain_outputs)

    def _measure(self, paths: Paths) -> tuple[NoiseFloor, RoutingLog, list[RoutingLog]]:
        carried = torch.zeros_like(self._inputs)
        log = RoutingLog(paths)
        exact = run_session(self._reference.exact.choosing(log), self._inputs, self._span, carried)
        rounded: list[Tensor] = []
        logs: list[RoutingLog] = []
        for runner in self._reference.rounded:
            # Along the exact run's choices: a near tie that they decide otherwise is no measure of rounding.
            logs.append(RoutingLog(follow=log))
            output = run_session(runner.choosing(logs[-1]), self._inputs, self._span)
            rounded.append(self._as_seen(output.to(self._wire_dtype).float(), exact))
        if not all(each.isfinite().all() for each in (exact, *rounded)):
            raise ValueError("the inputs make the span itself overflow")
        floor = measure_floor(self._inputs, exact, rounded, carried)
        return replace(floor, packed=self._packed), log, logs

    def _as_seen(self, output: Tensor, exact: Tensor) -> Tensor:
        """An output of all positions as far as it can be told from `exact` once it was packed."""
        if self._packed is None:
            return output
        return unpacked_towards(exact, rounded_where(output, self._packed), self._packed)

    def _explain(
        self,
        floor: NoiseFloor,
        exact: RoutingLog,
        rounded: Sequence[RoutingLog],
        outputs: Tensor,
        positions: Sequence[int],
    ) -> NoiseFloor:
        where = torch.tensor(positions, dtype=torch.long)
        packed = self._packed

        def run(paths: Paths) -> Run:
            output, log = self._run(paths)
            return Run(ratios(output), log)

        noise = router_noise(exact, rounded)
        unseen = sorted(set(range(positions[-1] if positions else 0)) - set(positions))
        draws = draw_unseen(exact, unseen, noise, _DRAWS, random.Random(0)) if unseen else []
        drawn, logs = self._draw(draws, exact, positions, floor.exact)
        noise = swayed_noise(noise, exact, logs)
        floor = replace(floor, drawn=drawn)
        # The unit of all attempts is this one: what the draws do is told from the run that they began from,
        # and against another attempt the draws would count that attempt's own swaps as noise.
        unit = floor.unit[where, None]
        clear = torch.tensor([position not in floor.faint for position in positions])

        def ratios(output: Tensor) -> Tensor:
            seen = unpacked_towards(output[where], outputs, None if packed is None else packed[where])
            rho = ((seen - output[where]) / floor.scale / unit).square().sum(-1).sqrt()
            return rho * clear

        found = explain(run, Run(ratios(floor.exact), exact), positions, noise)
        log = exact
        if found.paths:
            # What the drawn choices do beside those that explain the outputs.
            explained, log, _ = self._measure(found.paths)
            floor = replace(explained, drawn=self._draw(draws, log, positions, explained.exact)[0])
        return replace(
            floor,
            rerouted=frozenset(found.paths),
            undecided=found.undecided,
            doubtful=tied_tokens(log, noise),
        )

    def _draw(
        self, draws: Sequence[Paths], base: RoutingLog, positions: Sequence[int], unswayed: Tensor
    ) -> tuple[list[Tensor], list[RoutingLog]]:
        """Outputs, as far as they can be told from those without, and logs under drawn choices.

        Tokens that are seen keep those of `base`: which experts they took shows in their outputs, and a swap
        of theirs that a draw happens to bring about must not pass for noise.
        """
        logs = [RoutingLog(paths, follow=base, followers=positions) for paths in draws]
        exact = self._reference.exact
        runs = [run_session(exact.choosing(log), self._inputs, self._span) for log in logs]
        return [self._as_seen(each, unswayed) for each in runs], logs

    def _run(self, paths: Paths) -> tuple[Tensor, RoutingLog]:
        log = RoutingLog(paths)
        return run_session(self._reference.exact.choosing(log), self._inputs, self._span), log


def compare(
    floor: NoiseFloor, outputs: Tensor, positions: Sequence[int], tail: Tail | None = None
) -> Deviation:
    """Deviation of checked outputs from a session that was run again; see `measure_span`."""
    at = list(positions)
    where = torch.tensor(at, dtype=torch.long)
    floor = floor.explaining(outputs, at)
    outputs = floor.as_seen(outputs, where)
    with torch.inference_mode():
        deviations = floor.deviations(outputs, where)
        effect = _measure_logits(tail, floor, outputs, where) if tail and at else None
    unclear = floor.undecided | floor.faint
    first = float(deviations[0].norm()) if at and at[0] == 0 and 0 not in unclear else None
    chunks = tuple(
        describe_chunk(floor, at[part], deviations[part], effect.part(part) if effect else None)
        for part in split_chunks(1 if at[:1] == [0] else 0, len(at))
    )
    return Deviation(chunks, first)


def _measure_logits(tail: Tail, floor: NoiseFloor, outputs: Tensor, positions: Tensor) -> LogitEffect | None:
    """Effect of `outputs` on the logits; None where the blocks of the tail lack some of their inputs."""
    runs = [floor.exact, *floor.rounded]
    drawn: list[Tensor] = []
    if tail.runner is None:
        runs = [*(run[positions] for run in runs), outputs]
        drawn = [run[positions] for run in floor.drawn]
    elif len(outputs) < len(floor.exact):
        return None
    else:
        runs = run_sessions(tail.runner, [*runs, outputs], tail.span)
    unclear = floor.doubtful | floor.faint
    doubtful = torch.tensor([position in unclear for position in positions.tolist()])
    return measure_effect(tail.embedding_and_head, runs, drawn, doubtful)


def split_chunks(start: int, stop: int) -> list[slice]:
    """`start:stop` in parts of about `CHUNK_TOKENS`, as even as can be."""
    count = stop - start
    if count < 1:
        return []
    parts = max(1, round(count / CHUNK_TOKENS))
    bounds = [start + count * part // parts for part in range(parts + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def describe_chunk(
    floor: NoiseFloor, positions: Sequence[int], deviations: Tensor, logits: LogitDeviation | None = None
) -> ChunkDeviation:
    """Deviation of a chunk: of the tokens at `positions`, whose deviations from `floor` are given."""
    unclear = floor.undecided | floor.faint
    decided = torch.tensor([position not in unclear for position in positions])
    looked_at = torch.tensor(positions)[decided]
    deviations = deviations[decided]
    rho = deviations.square().sum(-1).sqrt()
    return ChunkDeviation(
        positions[0],
        positions[-1] + 1,
        len(rho),
        float(rho.quantile(0.5)) if len(rho) else 0.0,
        float(rho.quantile(_UPPER)) if len(rho) else 0.0,
        float(rho.max()) if len(rho) else 0.0,
        shared_part(deviations),
        logits,
        floor.alike(looked_at),
        high=int((rho > HIGH_RHO).sum()),
        undecided=len(positions) - len(rho),
        clouded=any(token <= positions[-1] for token in floor.undecided),
        swayed=floor.swayed(looked_at),
        rerouted=len(floor.rerouted.intersection(positions)),
    )
