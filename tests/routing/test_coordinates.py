import math
import random
import statistics

from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.routing.coordinates import (
    COORDINATE_LIMIT_MS,
    MAX_STEP_MS,
    Coordinate,
    distance_ms,
    starting_coordinate,
    update,
)

anything = st.floats(allow_nan=True, allow_infinity=True)
claims = st.builds(Coordinate, anything, anything, anything, anything, anything)
axis = st.floats(-COORDINATE_LIMIT_MS, COORDINATE_LIMIT_MS)
honest = st.builds(Coordinate, axis, axis, axis, st.floats(0.05, COORDINATE_LIMIT_MS), st.floats(0.05, 1))


def places_of(count: int, rng: random.Random) -> list[tuple[float, float, float]]:
    """Points on a plane of 200 ms by 200 ms, each behind an access link of 1 to 15 ms."""
    return [(rng.uniform(0, 200), rng.uniform(0, 200), rng.uniform(1, 15)) for _ in range(count)]


def true_rtt_ms(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    return math.dist(a[:2], b[:2]) + a[2] + b[2]


def settle(
    places: list[tuple[float, float, float]], liars: frozenset[int], rng: random.Random, rounds: int
) -> list[Coordinate]:
    """Every peer measures one random peer a round, with a tenth of jitter."""
    coordinates = [starting_coordinate(f"peer-{i}") for i in range(len(places))]
    for _ in range(rounds):
        for i, place in enumerate(places):
            j = rng.choice([other for other in range(len(places)) if other != i])
            claim = coordinates[j]
            if j in liars:
                claim = Coordinate(rng.uniform(-1e4, 1e4), rng.uniform(-1e4, 1e4), 0.0, 0.0, 0.0)
            coordinates[i] = update(
                coordinates[i], claim, true_rtt_ms(place, places[j]) * rng.uniform(1, 1.1)
            )
    return coordinates


def median_error(
    places: list[tuple[float, float, float]], coordinates: list[Coordinate], among: list[int]
) -> float:
    return statistics.median(
        abs(distance_ms(coordinates[i], coordinates[j]) / true_rtt_ms(places[i], places[j]) - 1)
        for i in among
        for j in among
        if i < j
    )


def test_coordinates_converge_on_random_points_of_a_plane() -> None:
    rng = random.Random(7)
    places = places_of(40, rng)
    coordinates = settle(places, frozenset(), rng, rounds=150)
    assert median_error(places, coordinates, list(range(40))) < 0.12
    assert statistics.median(coordinate.error for coordinate in coordinates) < 0.2


def test_a_tenth_of_liars_does_not_tear_the_map_apart() -> None:
    rng = random.Random(8)
    places = places_of(40, rng)
    coordinates = settle(places, frozenset(range(4)), rng, rounds=150)
    assert median_error(places, coordinates, list(range(4, 40))) < 0.25


@given(honest, claims, anything)
def test_one_sample_moves_a_peer_by_a_bounded_step_and_within_bounds(
    own: Coordinate, claim: Coordinate, rtt_ms: float
) -> None:
    moved = update(own, claim, rtt_ms)
    assert all(map(math.isfinite, moved))
    assert math.dist(own[:3], moved[:3]) <= MAX_STEP_MS + 1e-6
    assert abs(moved.height_ms - own.height_ms) <= MAX_STEP_MS + 1e-6
    assert all(abs(axis) <= COORDINATE_LIMIT_MS for axis in moved[:3])
    assert 0 < moved.height_ms <= COORDINATE_LIMIT_MS
    assert 0 < moved.error <= 1


@given(honest, honest)
def test_distance_is_symmetric_and_positive(a: Coordinate, b: Coordinate) -> None:
    assert distance_ms(a, b) == distance_ms(b, a) > 0


def test_a_measurement_that_is_no_number_moves_nothing() -> None:
    own, other = starting_coordinate("a"), starting_coordinate("b")
    assert update(own, other, math.nan) == own
    assert update(own, other, 0.0) == own
    assert update(own, other._replace(x_ms=math.inf), 20.0) == own


def test_peers_start_at_places_of_their_own() -> None:
    starts = {starting_coordinate(f"peer-{i}")[:3] for i in range(100)}
    assert len(starts) == 100
    assert starting_coordinate("peer-1") == starting_coordinate("peer-1")


def test_peers_at_the_very_same_place_still_learn_their_distance() -> None:
    place = starting_coordinate("a")
    a, b = place, place
    for _ in range(200):
        a, b = update(a, b, 40.0), update(b, a, 40.0)
    assert abs(distance_ms(a, b) - 40.0) < 2.0
