"""Speculative decoding: several tokens a trip, and the same text as without it.

A trip over the network costs the same delays for one token as for several. So guesses at the next tokens are
sent along with the last one, and every position's output comes back. The draw at a position is what it would
have been (models/text/sampling.py); if it equals the guess, the next position's output is valid as well, and
its draw costs no trip. The first guess that is wrong ends that, and the next step rolls the session back.

Guesses are copied from earlier in the text (draft.py), or drawn by a draft model (draft_model.py): from
whichever of them is right more often at this place.

How many guesses are sent is chosen anew for each trip: as many as bring most tokens a second, by what trips
have cost (`TripCost`) and by how often guesses have been right (`Acceptance`). Where that is not clearly more
than without guesses, none are sent. A guess that is wrong costs time and nothing else, and so does a drafter
that fails.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from p2pinfer.client_config import MAX_DEPTH
from p2pinfer.errors import LocalError

from .acceptance import Acceptance, copied, drawn, usual_share
from .draft import LazyDrafter, NgramDrafter

logger = logging.getLogger(__name__)

_CLEAR_GAIN: Final = 0.1  # predicted; estimates are noisy, and a wrong guess takes a hop's time from others
_PLAIN_TRIPS: Final = 3  # measured first
_TRIAL_DEPTH: Final = 3  # guesses in a trip that is made to learn what they cost
_TRIALS: Final = 2  # such trips, at the beginning
_TRY_AGAIN: Final = 64  # trips without guesses, after which one more is tried with a single guess
_LOOK_AGAIN: Final = 12  # the same where guesses would pay if they were right as often as usual
_REDRAW: Final = 20  # as long as so many guesses take, no guess is drawn after it did not pay
_LAST_PLAIN: Final = 9  # trips without guesses whose median counts
_LAST_GUESSES: Final = 5  # trips with guesses whose median counts
_REACH_GROWTH: Final = 2  # more drawn guesses in a trip than in any before, so that costs show in time


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
        drafter: Draws guesses, beside those that are copied; None if there is no draft model.
    """

    def __init__(self, depth: int | None = None) -> None:
        """Send `depth` guesses wherever there are any; as many as pay if it is None."""
        self.seen: set[int] = set()
        self.trips: list[tuple[int, float]] = []
        self._depth = depth
        self.drafter: LazyDrafter | None = None
        self._copier = NgramDrafter()
        self._cost = TripCost()
        self._acceptance = Acceptance()
        self._kinds: Sequence[int] = ()  # classes in `Acceptance` of the guesses that were sent last
        self._at = 0  # which of these is due
        self._draws = 0  # trips for which guesses were drawn
        self._undrawn = 0  # trips since
        self._reach = _TRIAL_DEPTH  # most guesses that are drawn for a trip
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
        copy = self._copier.draft(ids, last_id, most)
        guesses: Sequence[int] = copy.token_ids
        kinds: Sequence[int] = [copied(copy.matched + i) for i in range(len(guesses))]
        extra_s = 0.0
        if self.drafter is not None and most > 0 and self._prefers_drawn(kinds):
            guesses, kinds = self._draw(self.drafter, ids, last_id, most)
            extra_s = self.drafter.guess_s if self.drafter else 0.0
        depth = len(guesses) if self._depth is not None else self._best_depth(kinds, extra_s)
        self._kinds, self._at = kinds[:depth], 0
        return tuple(guesses[:depth])

    def note_guess(self, *, right: bool) -> None:
        """Note what became of the next guess of the last draft; those behind a wrong one are not noted."""
        self._checked[self._at] += 1
        self._right[self._at] += right
        self._acceptance.note(self._kinds[self._at], right)
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

    @property
    def seconds_of_guesses(self) -> float:
        """Seconds that the guesses of a usual trip so far add to it, finding them included."""
        trips = self._trips + len(self.trips)
        sent = self._drafted + sum(positions - 1 for positions, _ in self.trips)
        _, guess_s = self._prices(self.drafter.guess_s if self.drafter else 0.0)
        return guess_s * sent / trips if trips else 0.0

    def _note_trip(self, positions: int, seconds: float) -> None:
        self._trips += 1
        self._undrawn += 1
        self._plain += positions == 1
        self._without = self._without + 1 if positions == 1 else 0
        self._drafted += positions - 1
        self._cost.note(positions, seconds)

    def _prefers_drawn(self, copies: Sequence[int]) -> bool:
        """True if guesses are to be drawn, and not copied, which would be of these classes."""
        acceptance = self._acceptance
        if copies and acceptance.expect(copies[0]) >= acceptance.of_drawn:
            return False
        if self._depth is not None:
            return True
        if self._plain < _PLAIN_TRIPS:
            return False  # none would be sent
        assert self.drafter is not None
        plain_s, guess_s = self._prices(self.drafter.guess_s)
        if self._draws < _TRIALS or self._undrawn * plain_s >= max(_TRY_AGAIN * plain_s, _REDRAW * guess_s):
            return True
        tokens = chance = 1.0
        for depth in range(1, self._reach + 1):
            chance *= acceptance.of_drawn
            tokens += chance
            if tokens * plain_s > _clear_gain(plain_s, guess_s) * (plain_s + guess_s * depth):
                return True
        return False

    def _draw(
        self, drafter: LazyDrafter, ids: Sequence[int], last_id: int, most: int
    ) -> tuple[list[int], list[int]]:
        """Guesses and their classes: so many that another one would not pay if all of them were right."""
        guesses, kinds = list[int](), list[int]()
        self._draws += 1
        self._undrawn = 0
        tokens = chance = 1.0
        try:
            for token_id, probability in drafter.guesses(ids, last_id):
                guesses.append(token_id)
                kinds.append(drawn(probability))
                if len(guesses) == most:
                    break
                if self._depth is not None:
                    continue
                chance *= self._acceptance.expect(kinds[-1])
                tokens += chance
                plain_s, guess_s = self._prices(drafter.guess_s)
                if len(guesses) == self._reach:
                    self._reach += _REACH_GROWTH
                    break
                if chance * (plain_s + guess_s * len(guesses)) < tokens * guess_s:
                    break
        except (LocalError, RuntimeError, ValueError) as exc:
            logger.warning("the draft model is of no use here, going on without it: %s", exc)
            self.drafter = None
        return guesses, kinds

    def _prices(self, extra_s: float) -> tuple[float, float]:
        """Seconds of a trip without guesses, and more for each guess, which takes `extra_s` to find."""
        plain_s = self._cost.predict(1)
        return plain_s, self._cost.predict(2) - plain_s + extra_s

    def _best_depth(self, kinds: Sequence[int], extra_s: float) -> int:
        """Number of these guesses that brings most tokens a second; 0 where the gain is not clear."""
        if not kinds:
            return 0
        likely = self._acceptance.expect(kinds[0]) > 0.5
        if likely and self._plain >= _PLAIN_TRIPS and self._trials < _TRIALS:
            self._trials += 1
            return min(_TRIAL_DEPTH, len(kinds))
        if not self._cost.is_known:
            return 0
        plain_s, guess_s = self._prices(extra_s)
        clear_gain = _clear_gain(plain_s, guess_s)
        best, best_rate = 0, clear_gain / plain_s
        for depth, tokens in enumerate(self._acceptance.tokens(kinds)):
            rate = tokens / (plain_s + guess_s * depth)
            if depth and rate > best_rate:
                best, best_rate = depth, rate
        if best:
            return best
        # What a guess costs and brings is only learned by sending some: a line that was slow once is not slow
        # for ever, and a few wrong guesses in a row say little of those to come.
        usual = (1 + usual_share(kinds[0])) / (plain_s + guess_s)
        patience = _LOOK_AGAIN if usual > clear_gain / plain_s else _TRY_AGAIN
        return int((likely or patience == _LOOK_AGAIN) and self._without >= patience)


def _clear_gain(plain_s: float, guess_s: float) -> float:
    """Factor by which guesses have to bring more tokens a second than none do."""
    # Where guesses cost next to nothing, so does a wrong one, and a small gain is worth the try.
    return 1 + min(_CLEAR_GAIN, guess_s / plain_s)
