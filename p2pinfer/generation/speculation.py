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

While a trip is under way, further guesses may follow it as windows of their own, each on the assumption that
all before it are right (`Speculation.ahead`). A long copy then costs one trip and not one for every window.
docs/architecture.md has the numbers that decided when.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from p2pinfer.client_config import MAX_DEPTH
from p2pinfer.errors import LocalError

from .acceptance import Acceptance, copied, drawn, usual_share
from .draft import LazyDrafter, NgramDrafter
from .trip_cost import PLAIN_TRIPS, Crowd, TripCost

logger = logging.getLogger(__name__)

_CLEAR_GAIN: Final = 0.1  # predicted; estimates are noisy, and a wrong guess takes a hop's time from others
_MOST_LOST: Final = 0.035  # of all trips, by guesses; whoever has lost more sends none for a while
_TRIAL_DEPTH: Final = 3  # guesses in a trip that is made to learn what they cost
_TRIALS: Final = 2  # such trips, at the beginning
_TRY_AGAIN: Final = 64  # trips without guesses, after which one more is tried with a single guess
_LOOK_AGAIN: Final = 12  # the same where guesses would pay if they were right as often as usual
_CROWD: Final = 8  # texts at once; where more of them wait for each other, none has guesses
_FAR_CROWD: Final = 32  # the same far away, where so many keep this program's event loop busy
_REDRAW: Final = 20  # as long as so many guesses take, no guess is drawn after it did not pay
_REACH_GROWTH: Final = 2  # more drawn guesses in a trip than in any before, so that costs show in time
_FAR_REACH: Final = 8  # drawn guesses where the distance is known to set the pace
_WIDTH: Final = (
    8  # guesses in a window behind others: wider ones are back later, narrower ones cost more each
)
_WINDOWS: Final = 16  # of guesses that are copied at once
_LEAST_CHANCE: Final = 0.5  # that a window is of use; what hops compute for nobody is no client's own cost


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Result of speculative decoding in one generation.

    Attributes:
        tokens_per_trip: Tokens for each trip through the hops, the prompt's included; 1 without guesses. A
            window behind another is no trip of its own, since nobody waits for its way.
        drafted: Guesses sent.
        accepted: Guesses that were right.
        by_depth: Of first guesses in a trip, second ones, and so on: how many were looked at, which ends with
            the first that is wrong, and how many were right. The last place has all those behind it as well.
        in_flight: Mean number of windows under way when one of them came back; 1 if none followed another.
    """

    tokens_per_trip: float
    drafted: int
    accepted: int
    by_depth: tuple[tuple[int, int], ...]
    in_flight: float = 1.0


def speculation_by(setting: str, crowd: Crowd | None = None) -> Speculation | None:
    """Speculation for one generation among a `crowd`, by `ClientConfig.speculate`; None if it is off."""
    if setting == "off":
        return None
    return Speculation(None if setting == "auto" else int(setting), crowd=crowd)


class Speculation:
    """Chooses the guesses of one generation, and learns from what becomes of them.

    Not thread-safe: one call at a time. Where there is nothing to guess from, a token costs two look-ups.

    Attributes:
        seen: Tokens of the text. There is a guess only behind one of them; whoever draws tokens adds them.
        trips: Trips since the last guess: positions, which are a token and the guesses behind it, and
            seconds. Whoever makes trips adds them.
        windows: The same of windows behind others: positions, and seconds that they were waited for.
        followed: Sum over all that came back of the windows that were still under way.
        drafter: Draws guesses, beside those that are copied; None if there is no draft model.
    """

    def __init__(
        self,
        depth: int | None = None,
        *,
        in_flight: int | None = None,
        end_ids: frozenset[int] = frozenset(),
        crowd: Crowd | None = None,
    ) -> None:
        """Send `depth` guesses wherever there are any; as many as pay if it is None.

        Args:
            crowd: Of the texts that are generated beside this one.
            in_flight: Windows to have under way; if it is None, as many as pay, and one with a `depth`.
            end_ids: Tokens behind which there is nothing to guess.
        """
        self.seen: set[int] = set()
        self.trips: list[tuple[int, float]] = []
        self.windows: list[tuple[int, float]] = []
        self.followed = 0
        self.end_ids = end_ids
        self._depth = depth
        self._most_in_flight = in_flight or (None if depth is None else 1)
        self.drafter: LazyDrafter | None = None
        self._crowd = crowd
        if crowd is not None:
            crowd.count(self)  # those whose prompts are still on their way, too
        self._copier = NgramDrafter()
        self._cost = TripCost()
        self._acceptance = Acceptance()
        self._due = deque[int]()  # classes in `Acceptance` of guesses that were sent and not looked at
        self._behind = deque[tuple[int, int]]()  # guesses behind those that were sent, and their classes
        self._looked_at = 0  # guesses since the last trip began
        self._at_once = MAX_DEPTH  # most guesses in a window
        self._draws = 0  # trips for which guesses were drawn
        self._undrawn = 0  # trips since
        self._reach = _TRIAL_DEPTH  # most guesses that are drawn for a trip
        self._trips = self._plain = self._without = self._trials = self._drafted = 0
        self._lost = 0.0  # trips that guesses so far have cost, less those that right ones have saved
        self._followers = 0  # guesses that were sent behind others
        self._windows = self._positions_behind = 0
        self._checked = [0] * MAX_DEPTH
        self._right = [0] * MAX_DEPTH

    def guess(
        self,
        ids: Sequence[int],
        last_id: int,
        room: int,
        compute_s: float | None = None,
        *,
        expected_s: float | None = None,
        at_once: int = MAX_DEPTH,
    ) -> tuple[int, ...]:
        """Guesses to send with the next trip.

        Args:
            ids: All tokens before the one that is about to be sent.
            last_id: That one.
            room: Most guesses for which there are positions.
            compute_s: Seconds that a token takes in the hops' blocks, without what it waits; None if unknown.
            expected_s: Seconds that a trip should take by what is known of the lines; None if unknown.
            at_once: Most guesses that hops take in one step.
        """
        self._cost.compute_s, self._cost.expected_s = compute_s, expected_s
        self._note_trips()
        self._at_once = at_once
        self._due.clear()
        self._behind.clear()
        self._looked_at = 0
        if self._is_crowded():
            return ()
        most = min(room, at_once, MAX_DEPTH if self._depth is None else self._depth)
        is_alone = self._most_in_flight == 1
        copy = self._copier.draft(ids, last_id, most if is_alone else min(room, _WIDTH * _WINDOWS))
        copies = self._up_to_end(copy.token_ids)
        guesses: Sequence[int] = copies
        kinds: Sequence[int] = [copied(copy.matched + i) for i in range(len(copies))]
        extra_s = 0.0
        if self.drafter is not None and most > 0 and self._prefers_drawn(kinds):
            guesses, kinds = self._draw(self.drafter, ids, last_id, most)
            extra_s = self.drafter.guess_s if self.drafter else 0.0
        depth = (
            min(most, len(guesses)) if self._depth is not None else self._best_depth(kinds[:most], extra_s)
        )
        if self._depth is None and depth > _WIDTH and not is_alone and self._is_likely(kinds[: _WIDTH + 1]):
            depth = _WIDTH  # the rest follows it
        self._due.extend(kinds[:depth])
        if depth and not is_alone:
            self._behind.extend(zip(guesses[depth:], kinds[depth:], strict=True))
        return tuple(guesses[:depth])

    def ahead(self, in_flight: int) -> tuple[int, ...]:
        """Guesses to send behind `in_flight` windows that are under way; none if that would not pay.

        They go on where the guesses sent last end, and count as sent.
        """
        if not self._behind or in_flight >= (self._most_in_flight or _WINDOWS):
            return ()
        self._note_trips()
        width = min(len(self._behind), self._at_once, self._depth or _WIDTH)
        if self._most_in_flight is None and not self._pays(width, in_flight):
            return ()
        window = [self._behind.popleft() for _ in range(width)]
        self._due.extend(kind for _, kind in window)
        self._followers += width
        return tuple(token_id for token_id, _ in window)

    def note_guess(self, *, right: bool) -> None:
        """Note what became of the next guess that was sent; those behind a wrong one are not noted."""
        depth = min(self._looked_at, MAX_DEPTH - 1)
        self._checked[depth] += 1
        self._right[depth] += right
        self._lost -= right
        self._acceptance.note(self._due.popleft(), right)
        self._looked_at += 1

    def end(self) -> None:
        """Say that the text has ended, so that others do not make room for it; harmless twice."""
        if self._crowd is not None:
            self._crowd.leave(self)

    def stats(self, tokens: int) -> SpeculationStats:
        """Result so far, of a generation that has drawn so many tokens."""
        waiting = [positions for positions, _ in self.trips]
        deepest = MAX_DEPTH - next((i for i, each in enumerate(reversed(self._checked)) if each), MAX_DEPTH)
        return SpeculationStats(
            tokens / (self._trips + len(waiting) + 1),
            self._drafted + sum(waiting) - len(waiting) + self._followers,
            sum(self._right),
            tuple(zip(self._checked[:deepest], self._right[:deepest], strict=True)),
            1 + self.followed / max(1, self._trips + len(waiting) + self._windows + len(self.windows)),
        )

    @property
    def seconds_of_guesses(self) -> float:
        """Seconds that the guesses of a usual trip so far add to it, finding them included."""
        trips = self._trips + len(self.trips)
        sent = self._drafted + sum(positions - 1 for positions, _ in self.trips)
        _, guess_s = self._prices(self.drafter.guess_s if self.drafter else 0.0)
        behind = self._positions_behind + sum(positions for positions, _ in self.windows)
        return (guess_s * sent + self._cost.waited_s * behind) / trips if trips else 0.0

    def _up_to_end(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Guesses up to an end of the text, which nothing follows."""
        ends = (i for i, token_id in enumerate(token_ids) if token_id in self.end_ids)
        return token_ids[: next(ends, len(token_ids)) + 1]

    def _note_trips(self) -> None:
        trips, self.trips = self.trips, []
        for positions, seconds in trips:
            self._note_trip(positions, seconds)
        windows, self.windows = self.windows, []
        for positions, seconds in windows:
            self._windows += 1
            self._positions_behind += positions
            self._cost.note_behind(positions, seconds)

    def _note_trip(self, positions: int, seconds: float) -> None:
        self._trips += 1
        self._undrawn += 1
        self._plain += positions == 1
        self._without = self._without + 1 if positions == 1 else 0
        self._drafted += positions - 1
        self._cost.note(positions, seconds)
        # As predicted, not as it was: one trip that stood in a queue is not its guesses' fault. Nor do they
        # cost more than as many trips of their own.
        if plain_s := self._cost.predict(1):
            self._lost += min((self._cost.predict(positions) - plain_s) / plain_s, positions - 1)

    def _is_crowded(self) -> bool:
        """True if trips take what many texts take of this machine and of the hops, more than the distance.

        Each text finds by its own trips that guesses cost nothing, since a trip is as long as all steps of
        all texts. But every wrong guess takes the place of a token: 64 texts at once had a quarter fewer
        tokens a second with guesses than without, and some of them a third fewer than others.
        """
        if self._depth is not None or self._crowd is None:
            return False
        return self._crowd.count(self) > (_FAR_CROWD if self._cost.is_far else _CROWD)

    def _is_likely(self, kinds: Sequence[int]) -> bool:
        """True if all of these guesses are right often enough for something to follow them."""
        return len(kinds) > _WIDTH and self._acceptance.of_all(kinds) >= _LEAST_CHANCE

    def _pays(self, width: int, in_flight: int) -> bool:
        """True if a window of so many guesses, behind so many windows, saves more than it may cost."""
        chance = self._acceptance.of_all([*self._due, self._behind[0][1]])
        if chance < _LEAST_CHANCE:
            return False
        trip_s, window_s = self._cost.predict(1), width * self._cost.work_s
        # At the plateau, hops have work until the first one is back; more would only wait for them.
        if (in_flight - 1) * window_s >= trip_s:
            return False
        return chance * trip_s > (1 - chance) * window_s

    def _prefers_drawn(self, copies: Sequence[int]) -> bool:
        """True if guesses are to be drawn, and not copied, which would be of these classes."""
        acceptance = self._acceptance
        if copies and acceptance.expect(copies[0]) >= acceptance.of_drawn:
            return False
        if self._depth is not None:
            return True
        if self._has_lost:
            return False
        if self._plain < PLAIN_TRIPS and not self._cost.is_far:
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
        reach = max(self._reach, _FAR_REACH if self._cost.is_far else 0)
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
                if len(guesses) == reach:
                    self._reach = reach + _REACH_GROWTH
                    break
                if chance * (plain_s + guess_s * len(guesses)) < tokens * guess_s:
                    break
        except (LocalError, RuntimeError, ValueError) as exc:
            logger.warning("the draft model is of no use here, going on without it: %s", exc)
            self.drafter = None
        return guesses, kinds

    @property
    def _has_lost(self) -> bool:
        """True if guesses have cost so much that there are to be none for a while."""
        return self._lost > _MOST_LOST * self._trips

    def _prices(self, extra_s: float) -> tuple[float, float]:
        """Seconds of a trip without guesses, and more for each guess, which takes `extra_s` to find."""
        plain_s = self._cost.predict(1)
        return plain_s, self._cost.predict(2) - plain_s + extra_s

    def _best_depth(self, kinds: Sequence[int], extra_s: float) -> int:
        """Number of these guesses that brings most tokens a second; 0 where the gain is not clear."""
        if not kinds or self._has_lost:
            return 0
        likely = self._acceptance.expect(kinds[0]) > 0.5
        if likely and self._plain >= PLAIN_TRIPS and self._trials < _TRIALS and not self._cost.is_far:
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
