"""Search for the experts that a peer chose, where rounding decides a router's near tie.

A mixture's router sends a token to the experts with the highest scores. Where two scores lie closer than
rounding errors, honest peers choose differently, and their outputs differ by tens of floors. So an output is
held against the nearest of the admissible choices:

- Scores of the rounded runs, which follow the exact run's choices, give the noise of each router.
- A swap of experts costs (difference of their scores / noise)^2. A token's choices over all blocks are
  admissible if their costs come to `REACH`^2 at most: as with independent normal errors, whose squares add.
- A swap changes all later blocks' inputs, and through attention those of later tokens. So every attempt runs
  the session again under the choices in question, and near ties behind a swap are found in that run.

Only tokens that deviate by more than `ACCEPTED` are searched for, each along its own tree, the likeliest
choices first; one run tries a path for each of them at once. A token whose tree is exhausted keeps its
deviation. What is left after `MAX_RUNS` is undecided and says nothing. Nothing is gained by taking another
admissible choice: it is as right as the reference's.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final, TypeAlias

import torch
from torch import Tensor

REACH: Final = 8.0  # roundings of a score that all swaps of a token may take together
TIED: Final = 5.0  # roundings of a score within which tokens that are not seen may have gone either way
ACCEPTED: Final = 3.0  # ratio up to which a token needs no explanation
HOPELESS: Final = 8.0  # ratio of an unexplained token after which nobody asks for explanations of others
MAX_RUNS: Final = 24
_EXPLAINED: Final = 0.3  # of a token's ratio, what a path leaves that is kept for now
_FOR_NOW: Final = 6.0  # and what it may leave at most
_QUEUED: Final = 32  # paths of one token that wait to be tried

Path: TypeAlias = Mapping[int, tuple[int, ...]]  # experts of one token by block, where not the router's own
Paths: TypeAlias = Mapping[int, Path]  # by token


class RoutingLog:
    """`ExpertChoice` of one session that notes every score and every choice.

    Args:
        paths: Choices to force; elsewhere each router has its own.
        follow: Log of the same session whose choices are taken instead.
        followers: Tokens that do so, where not all do; ascending.
    """

    def __init__(
        self,
        paths: Paths | None = None,
        follow: RoutingLog | None = None,
        followers: Sequence[int] | None = None,
    ) -> None:
        self._paths = paths or {}
        self._follow = follow
        self._followers = None if followers is None else torch.tensor(followers, dtype=torch.long)
        self._scores: dict[int, list[Tensor]] = {}
        self._chosen: dict[int, list[Tensor]] = {}

    def choose(self, block: int, scores: Tensor, count: int) -> Tensor:
        """See `ExpertChoice`; a session's tokens come in order."""
        noted = self._scores.setdefault(block, [])
        at = sum(map(len, noted))
        noted.append(scores)
        if self._follow is not None and self._followers is None:
            chosen = self._follow.chosen(block)[at : at + len(scores)]
        else:
            chosen = scores.topk(count, dim=-1).indices
            if self._follow is not None and self._followers is not None:
                here = self._followers[(self._followers >= at) & (self._followers < at + len(scores))]
                chosen[here - at] = self._follow.chosen(block)[here]
            for token, path in self._paths.items():
                if block in path and 0 <= token - at < len(scores):
                    chosen[token - at] = torch.tensor(path[block], device=chosen.device)
        self._chosen.setdefault(block, []).append(chosen)
        return chosen

    @property
    def blocks(self) -> list[int]:
        """Blocks that chose, in order."""
        return sorted(self._scores)

    def scores(self, block: int) -> Tensor:
        """(tokens, experts) of a block."""
        return torch.cat(self._scores[block])

    def chosen(self, block: int) -> Tensor:
        """(tokens, count) of a block."""
        return torch.cat(self._chosen[block])


class SharedChoice:
    """`ExpertChoice` of sessions of one length in one batch: the first one's choice is that of all."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def choose(self, block: int, scores: Tensor, count: int) -> Tensor:
        """See `ExpertChoice`; each session is `tokens` rows."""
        return scores[: self._tokens].topk(count, dim=-1).indices.repeat(len(scores) // self._tokens, 1)


@dataclass(frozen=True, slots=True)
class Run:
    """An exact run under some choices, and the unit in which outputs are held against it.

    Attributes:
        rho: Of tokens (n,), the ratios of the outputs in question.
        log: Its routers' scores and choices.
    """

    rho: Tensor
    log: RoutingLog


@dataclass(frozen=True, slots=True)
class Explanation:
    """Result of a search.

    Attributes:
        paths: Choices that explain the outputs best, of tokens that did not take the reference's.
        undecided: Tokens with choices that were not tried.
    """

    paths: Paths
    undecided: frozenset[int] = frozenset()


@dataclass(slots=True)
class _Open:
    """A token that deviates, and the paths that may be why."""

    queue: list[tuple[float, int, dict[int, tuple[int, ...]]]] = field(
        default_factory=list[tuple[float, int, dict[int, tuple[int, ...]]]]
    )
    seen: set[frozenset[tuple[int, tuple[int, ...]]]] = field(
        default_factory=set[frozenset[tuple[int, tuple[int, ...]]]]
    )
    first: float = float("inf")
    least: float = float("inf")
    best: Path = field(default_factory=dict[int, tuple[int, ...]])


def router_noise(exact: RoutingLog, rounded: Sequence[RoutingLog]) -> dict[int, Tensor]:
    """By block, (tokens,): how far rounding moves a router's score, in the root mean square.

    What moves all scores of a token alike changes no choice and is left out.
    """
    noise: dict[int, Tensor] = {}
    for block in exact.blocks:
        errors = torch.stack([each.scores(block) - exact.scores(block) for each in rounded])
        errors -= errors.mean(-1, keepdim=True)
        typical = errors.square().mean((0, 2)).sqrt()
        # A token that happened to round well is no surer than others.
        noise[block] = typical.clamp_min(float(typical.median())).clamp_min(1e-12)
    return noise


def explain(
    run: Callable[[Paths], Run], base: Run, positions: Sequence[int], noise: Mapping[int, Tensor]
) -> Explanation:
    """Search for admissible choices that explain a peer's outputs.

    Args:
        run: Runs the session under these choices.
        base: The run without any.
        positions: Of the tokens that `Run.rho` is about, ascending.
        noise: See `router_noise`.
    """
    return _Search(run, positions, noise).search(base)


def tied_tokens(log: RoutingLog, noise: Mapping[int, Tensor]) -> frozenset[int]:
    """Tokens with a near tie in any block."""
    tied = ((roundings <= TIED).nonzero()[:, 0].tolist() for _, roundings in _near_ties(log, noise))
    return frozenset(token for tokens in tied for token in tokens)


def draw_unseen(
    log: RoutingLog, unseen: Sequence[int], noise: Mapping[int, Tensor], count: int, rng: random.Random
) -> list[dict[int, Path]]:
    """Choices of tokens whose outputs are not to be seen, `count` times, as honest peers may have made them.

    A token's near ties are each decided the other way in one of the draws. So none is left out, up to `count`
    of a token: by coins, those of the last blocks of a deep span would be. And no draw has many more than
    rounding brings about. One tie of a token in a draw, for the run decides what follows of it.
    """
    near: dict[int, list[tuple[float, int, tuple[int, ...]]]] = {}
    for block, roundings in _near_ties(log, noise):
        scores, chosen = log.scores(block), log.chosen(block)
        for token in (each for each in unseen if roundings[each] <= TIED):
            if swaps := _swaps(scores[token], chosen[token], TIED * float(noise[block][token])):
                near.setdefault(token, []).append((float(roundings[token]), block, rng.choice(swaps)))
    draws: list[dict[int, Path]] = [{} for _ in range(count)]
    for token, ties in near.items():
        for (_, block, experts), draw in zip(sorted(ties), rng.sample(draws, count), strict=False):
            draw[token] = {block: experts}
    return [draw for draw in draws if draw]


def swayed_noise(
    noise: Mapping[int, Tensor], base: RoutingLog, drawn: Sequence[RoutingLog]
) -> dict[int, Tensor]:
    """`noise`, and what the draws of `draw_unseen` move the scores of the other tokens by."""
    swayed = dict(noise)
    for block, each in noise.items():
        for log in drawn:
            moved = log.scores(block) - base.scores(block)
            moved -= moved.mean(-1, keepdim=True)
            further = (each.square() + moved.square().mean(-1)).sqrt()
            swayed[block] = swayed[block].maximum(further)
    return swayed


def _near_ties(log: RoutingLog, noise: Mapping[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """By block, (tokens,): lead of the last expert that is chosen over the next one, in roundings."""
    for block in log.blocks:
        scores, count = log.scores(block), log.chosen(block).shape[-1]
        if count < scores.shape[-1]:  # else every token goes to all experts
            last, following = scores.topk(count + 1, dim=-1).values[:, -2:].unbind(-1)
            yield block, (last - following) / noise[block]


class _Search:
    def __init__(
        self, run: Callable[[Paths], Run], positions: Sequence[int], noise: Mapping[int, Tensor]
    ) -> None:
        self._run = run
        self._row = {token: row for row, token in enumerate(positions)}
        self._noise = noise
        self._paths: dict[int, Path] = {}
        self._open: dict[int, _Open] = {}
        self._exhausted: dict[int, _Open] = {}
        self._runs = 0
        self._ties = count()

    def search(self, base: Run) -> Explanation:
        latest = base
        while self._reopen(latest):
            while self._open and self._runs < MAX_RUNS and not self._is_hopeless():
                latest = self._try_one_each()
            if self._open or self._runs >= MAX_RUNS or not self._paths:
                break
            latest = self._attempt(self._paths)
        # One that nothing explains is enough, and the others count as they are.
        return Explanation(self._paths, frozenset(() if self._is_hopeless() else self._open))

    def _attempt(self, paths: Paths) -> Run:
        self._runs += 1
        return self._run(paths)

    def _reopen(self, latest: Run) -> bool:
        """Open the search for every token that deviates, if it was not searched for in vain."""
        for token, row in self._row.items():
            if latest.rho[row] <= ACCEPTED or token in self._exhausted or token in self._open:
                continue
            rho = float(latest.rho[row])
            opened = _Open(first=rho, least=rho, best=self._paths.get(token, {}))
            self._grow(token, opened, opened.best, latest.log)
            (self._open if opened.queue else self._exhausted)[token] = opened
        return bool(self._open)

    def _is_hopeless(self) -> bool:
        """True if the first token that deviates has no explanation, so that it is none of the peer's luck."""
        first = min((*self._open, *self._exhausted), default=None)
        return first in self._exhausted and self._exhausted[first].least > HOPELESS

    def _try_one_each(self) -> Run:
        tried = {token: heapq.heappop(opened.queue)[2] for token, opened in self._open.items()}
        latest = self._attempt({**self._paths, **tried})
        settled: list[int] = []
        for token, path in tried.items():
            opened, rho = self._open[token], float(latest.rho[self._row[token]])
            if rho < opened.least:
                opened.least, opened.best = rho, path
            # Earlier tokens whose experts are still wrong move this one a little; it is looked at once more.
            if rho <= max(ACCEPTED, min(_EXPLAINED * opened.first, _FOR_NOW)):
                self._paths[token] = path
                settled.append(token)
                del self._open[token]
                continue
            self._grow(token, opened, path, latest.log)
            if not opened.queue:
                self._exhausted[token] = self._open.pop(token)
        self._retry_after(settled)
        return latest

    def _retry_after(self, settled: Iterable[int]) -> None:
        """Paths of later tokens were tried while an earlier one had another past: have them tried again."""
        first = min(settled, default=None)
        if first is None:
            return
        for token in [token for token in self._exhausted if token > first]:
            self._open[token] = self._exhausted.pop(token)
            self._push(self._open[token], 0.0, dict(self._open[token].best))
        for token, opened in self._open.items():
            if token > first:
                self._push(opened, 0.0, dict(self._paths.get(token, {})))

    def _grow(self, token: int, opened: _Open, path: Path, log: RoutingLog) -> None:
        """Queue the admissible paths that are one swap more than `path`, under which `log` was noted."""
        spent = sum(self._cost(token, block, path[block], log) for block in path)
        last = max(path, default=-1)
        for block in log.blocks:
            if block < last:
                continue
            scores, chosen = log.scores(block)[token], log.chosen(block)[token]
            least = spent - (self._cost(token, block, path[block], log) if block in path else 0.0)
            for experts in _swaps(scores, chosen, REACH * float(self._noise[block][token])):
                cost = least + self._cost(token, block, experts, log)
                grown = {**path, block: experts}
                key = frozenset(grown.items())
                if cost <= REACH**2 and key not in opened.seen and len(opened.queue) < _QUEUED:
                    opened.seen.add(key)
                    self._push(opened, cost, grown)

    def _push(self, opened: _Open, cost: float, path: dict[int, tuple[int, ...]]) -> None:
        heapq.heappush(opened.queue, (cost, next(self._ties), path))

    def _cost(self, token: int, block: int, experts: tuple[int, ...], log: RoutingLog) -> float:
        """Square of the roundings that it takes for `experts` to be the best ones."""
        scores = log.scores(block)[token]
        inside = torch.zeros(len(scores), dtype=torch.bool)
        inside[list(experts)] = True
        gap = float(scores[~inside].max() - scores[inside].min()) if not inside.all() else 0.0
        return max(0.0, gap / float(self._noise[block][token])) ** 2


def _swaps(scores: Tensor, chosen: Tensor, reach: float) -> list[tuple[int, ...]]:
    """Choices that differ from `chosen` in one expert, by no more than `reach` of the scores."""
    outside = torch.ones(len(scores), dtype=torch.bool)
    outside[chosen] = False
    others = outside.nonzero()[:, 0]
    near = (scores[chosen][:, None] - scores[others]).abs() <= reach
    experts, better = chosen.tolist(), others.tolist()
    return [
        tuple(sorted({*experts[:worse], *experts[worse + 1 :], better[other]}))
        for worse, other in near.nonzero().tolist()
    ]
