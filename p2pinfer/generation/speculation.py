"""Speculative decoding: several tokens a trip, and the same text as without it.

A trip over the network costs the same delays for one token as for several. So guesses at the next tokens are
sent along with the last one, and every position's output comes back. The draw at a position is what it would
have been (models/text/sampling.py); if it equals the guess, the next position's output is valid as well, and
its draw costs no trip. The first guess that is wrong ends that, and the next step rolls the session back.

How many guesses are sent is chosen anew for each trip: as many as bring most tokens a second, by what trips
have cost (`TripCost`) and by how often guesses have been right (`Acceptance`). Where that is not clearly more
than without guesses, none are sent. A guess that is wrong costs time and nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from p2pinfer.client_config import MAX_DEPTH

from .draft import Draft, NgramDrafter

_CLEAR_GAIN: Final = 0.1  # predicted; estimates are noisy, and a wrong guess takes a hop's time from others
_PLAIN_TRIPS: Final = 3  # measured first
_TRIAL_DEPTH: Final = 3  # guesses in a trip that is made to learn what they cost
_TRIALS: Final = 2  # such trips, at the beginning
_TRY_AGAIN: Final = 64  # trips without guesses, after which one more is tried with a single guess
_LOOK_AGAIN: Final = 12  # the same where guesses would pay if they were right as often as usual
_LAST_PLAIN: Final = 9  # trips without guesses whose median counts
_LAST_GUESSES: Final = 5  # trips with guesses whose median counts
_DECAY: Final = 0.95  # of the weight of earlier guesses with each new one
# Share of first guesses that were right, by the tokens matched (0: unused), measured on stories, chat, code
# and extraction with a model of 135 million parameters. Each counts like so many guesses seen.
_RIGHT: Final = (0.0, 0.26, 0.55, 0.64, 0.72, 0.8, 0.92)
_PRIOR_WEIGHT: Final = 8.0


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Result of speculative decoding in one generation.

    Attributes:
        tokens_per_trip: Tokens for each trip through the hops, the prompt's included; 1 without guesses.
        drafted: Guesses sent.
        accepted: Guesses that were right.
        by_depth: Of first guesses in a trip, second ones, and so on: how many were looked at, which ends with
            the first that is wrong, and how many were right.
    """

    tokens_per_trip: float
    drafted: int
    accepted: int
    by_depth: tuple[tuple[int, int], ...]


class TripCost:
    """Seconds of a trip: those of one without guesses, and more for each guess. Medians of the last trips.

    No fitted line: that would forget what a guess costs while none are sent. And no means: one trip that
    stood in a queue says nothing of the next. Until a guess was sent, one is taken to cost as much as a token
    does in the hops' blocks: a step of several positions never computes more than as many steps of one.

    Attributes:
        compute_s: Seconds of a token in the hops' blocks; None if not known.
    """

    def __init__(self) -> None:
        self.compute_s: float | None = None
        self._plain_s = deque[float](maxlen=_LAST_PLAIN)
        self._guess_s = deque[float](maxlen=_LAST_GUESSES)

    def note(self, positions: int, seconds: float) -> None:
        """Note what a trip with `positions - 1` guesses took."""
        if positions == 1:
            self._plain_s.append(seconds)
        else:
            self._guess_s.append((seconds - self.predict(1)) / (positions - 1))

    def predict(self, positions: int) -> float:
        """Seconds that a trip will take; one with guesses takes no less than one without."""
        plain_s = median(self._plain_s) if self._plain_s else 0.0
        guess_s = median(self._guess_s) if self._guess_s else self.compute_s or 0.0
        return plain_s + max(0.0, guess_s) * (positions - 1)

    @property
    def is_known(self) -> bool:
        """True if there is something to go by."""
        plain_known = len(self._plain_s) >= _PLAIN_TRIPS
        return plain_known and (bool(self._guess_s) or self.compute_s is not None)


class Acceptance:
    """Share of guesses that turned out right, by the number of tokens matched before them."""

    def __init__(self) -> None:
        self._seen = [_PRIOR_WEIGHT] * len(_RIGHT)
        self._right = [_PRIOR_WEIGHT * share for share in _RIGHT]

    def note(self, matched: int, right: bool) -> None:
        """Note what became of a guess; those behind a wrong one say nothing."""
        at = min(matched, len(_RIGHT) - 1)
        self._seen[at] = self._seen[at] * _DECAY + 1
        self._right[at] = self._right[at] * _DECAY + right

    def expect(self, matched: int) -> float:
        """Probability that a guess is right if those before it were, 0 to 1."""
        at = min(matched, len(_RIGHT) - 1)
        return self._right[at] / self._seen[at]


def usual_share(matched: int) -> float:
    """Share of guesses that are right in most texts, by the tokens matched before them."""
    return _RIGHT[min(matched, len(_RIGHT) - 1)]


def speculation_by(setting: str) -> Speculation | None:
    """Speculation for one generation, by `ClientConfig.speculate`; None if it is off."""
    if setting == "off":
        return None
    return Speculation(None if setting == "auto" else int(setting))


class Speculation:
    """Chooses the guesses of one generation, and learns from what becomes of them.

    Not thread-safe: one call at a time. Where there is nothing to guess from, a token costs two look-ups.

    Attributes:
        seen: Tokens of the text. There is a guess only behind one of them; whoever draws tokens adds them.
        trips: Trips since the last guess: positions, which are a token and the guesses behind it, and
            seconds. Whoever makes trips adds them.
    """

    def __init__(self, depth: int | None = None) -> None:
        """Send `depth` guesses wherever there are any; as many as pay if it is None."""
        self.seen: set[int] = set()
        self.trips: list[tuple[int, float]] = []
        self._depth = depth
        self._drafter = NgramDrafter()
        self._cost = TripCost()
        self._acceptance = Acceptance()
        self._matched = self._at = 0  # of the last draft, and of the guess that is due
        self._trips = self._plain = self._without = self._trials = self._drafted = 0
        self._checked = [0] * MAX_DEPTH
        self._right = [0] * MAX_DEPTH

    def guess(
        self, ids: Sequence[int], last_id: int, room: int, compute_s: float | None = None
    ) -> tuple[int, ...]:
        """Guesses to send with the next trip.

        Args:
            ids: All tokens before the one that is about to be sent.
            last_id: That one.
            room: Most guesses for which there are positions.
            compute_s: Seconds that a token takes in the hops' blocks, without what it waits; None if unknown.
        """
        self._cost.compute_s = compute_s
        trips, self.trips = self.trips, []
        for positions, seconds in trips:
            self._note_trip(positions, seconds)
        most = min(room, MAX_DEPTH if self._depth is None else self._depth)
        draft = self._drafter.draft(ids, last_id, most)
        depth = len(draft.token_ids) if self._depth is not None else self._best_depth(draft)
        self._matched, self._at = draft.matched, 0
        return draft.token_ids[:depth]

    def note_guess(self, *, right: bool) -> None:
        """Note what became of the next guess of the last draft; those behind a wrong one are not noted."""
        self._checked[self._at] += 1
        self._right[self._at] += right
        self._acceptance.note(self._matched + self._at, right)
        self._at += 1

    def stats(self, tokens: int) -> SpeculationStats:
        """Result so far, of a generation that has drawn so many tokens."""
        waiting = [positions for positions, _ in self.trips]
        deepest = MAX_DEPTH - next((i for i, each in enumerate(reversed(self._checked)) if each), MAX_DEPTH)
        return SpeculationStats(
            tokens / (self._trips + len(waiting) + 1),
            self._drafted + sum(waiting) - len(waiting),
            sum(self._right),
            tuple(zip(self._checked[:deepest], self._right[:deepest], strict=True)),
        )

    def _note_trip(self, positions: int, seconds: float) -> None:
        self._trips += 1
        self._plain += positions == 1
        self._without = self._without + 1 if positions == 1 else 0
        self._drafted += positions - 1
        self._cost.note(positions, seconds)

    def _best_depth(self, draft: Draft) -> int:
        """Number of guesses that brings most tokens a second; 0 where the gain is not clear."""
        if not draft.token_ids:
            return 0
        likely = self._acceptance.expect(draft.matched) > 0.5
        if likely and self._plain >= _PLAIN_TRIPS and self._trials < _TRIALS:
            self._trials += 1
            return min(_TRIAL_DEPTH, len(draft.token_ids))
        if not self._cost.is_known:
            return 0
        tokens = chance = 1.0
        plain_s = self._cost.predict(1)
        guess_s = self._cost.predict(2) - plain_s
        # Where guesses cost next to nothing, so does a wrong one, and a small gain is worth the try.
        clear_gain = 1 + min(_CLEAR_GAIN, guess_s / plain_s)
        best, best_rate = 0, clear_gain / plain_s
        for depth in range(1, len(draft.token_ids) + 1):
            chance *= self._acceptance.expect(draft.matched + depth - 1)
            tokens += chance
            rate = tokens / (plain_s + guess_s * depth)
            if rate > best_rate:
                best, best_rate = depth, rate
        if best:
            return best
        # What a guess costs and brings is only learned by sending some: a line that was slow once is not slow
        # for ever, and a few wrong guesses in a row say little of those to come.
        usual = (1 + usual_share(draft.matched)) / (plain_s + guess_s)
        patience = _LOOK_AGAIN if usual > clear_gain / plain_s else _TRY_AGAIN
        return int((likely or patience == _LOOK_AGAIN) and self._without >= patience)
