"""Speculation: what it sends, and that the text stays the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pinfer.client import Client
from p2pinfer.client_config import MAX_DEPTH, AuditConfig, ClientConfig, SessionConfig
from p2pinfer.generation.speculation import Speculation, speculation_by
from p2pinfer.generation.trip_cost import Crowd, TripCost
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.text.text import Tokenizer

from ..clients import OpenClient
from ..memory_client import open_memory_client
from ..node.memory_swarm import MemorySwarm, open_memory_swarm, route_over
from .texts import Walk, local_ids, start

DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 3}
REPEATING = "Tom has a red ball. Tom has a blue ball. Tom has a red ball. Tom has a"


# ---------------------------------------------------------------------- how many guesses


def guesses_behind(
    speculation: Speculation, text: list[int], room: int, compute_s: float | None = None
) -> tuple[int, ...]:
    return speculation.guess(text[:-1], text[-1], room, compute_s)


def seconds_of(
    text: list[int],
    speculation: Speculation | None,
    trip_s: float,
    position_s: float,
    compute_s: float | None = None,
) -> float:
    """Time that a text takes where trips cost that much, its first 20 tokens given."""
    spent, length = 0.0, 20
    while length < len(text):
        guesses = (
            ()
            if speculation is None
            else guesses_behind(speculation, text[:length], len(text) - length - 1, compute_s)
        )
        seconds = trip_s + position_s * (1 + len(guesses))
        spent += seconds
        length += 1
        if speculation is None:
            continue
        speculation.trips.append((1 + len(guesses), seconds))
        for guess in guesses:
            right = guess == text[length - 1]
            speculation.note_guess(right=right)
            if not right:
                break
            length += 1
    return spent


def repeating(rng: random.Random, count: int) -> list[int]:
    """Text that quotes itself at length."""
    text = [rng.randrange(500) for _ in range(60)]
    while len(text) < count:
        begin = rng.randrange(len(text) - 40)
        text += [rng.randrange(500), *text[begin : begin + rng.randrange(10, 40)]]
    return text[:count]


@pytest.mark.parametrize("position_s", [0.0, 0.001, 0.02])
def test_a_text_that_quotes_itself_takes_far_fewer_trips(position_s: float) -> None:
    text = repeating(random.Random(1), 600)
    plain = seconds_of(text, None, 0.2, position_s)
    assert seconds_of(text, Speculation(), 0.2, position_s) < plain / 2.5


def half_predictable(rng: random.Random, count: int) -> list[int]:
    """Text of words, whose second token mostly follows from the first, as in any language."""
    text: list[int] = []
    while len(text) < count:
        first = rng.randrange(120)
        text += [first, 120 + first if rng.random() < 0.6 else rng.randrange(240)]
    return text[:count]


@pytest.mark.parametrize("seed", [1, 2])
def test_far_away_weak_guesses_pay_from_the_first_trips_on(seed: int) -> None:
    """A quarter of a second a trip, a fiftieth in the blocks: what is known of those is enough to begin."""
    text = half_predictable(random.Random(seed), 500)
    plain = seconds_of(text, None, 0.25, 0.005)
    unknown = seconds_of(text, Speculation(), 0.25, 0.005)
    assert seconds_of(text, Speculation(), 0.25, 0.005, compute_s=0.02) < min(0.93 * plain, unknown)


@pytest.mark.parametrize("vocab", [5, 40, 5000])
@pytest.mark.parametrize(
    ("trip_s", "position_s"), [(0.2, 0.0), (0.2, 0.01), (0.2, 0.04), (0.05, 0.05), (0.0, 0.1)]
)
@pytest.mark.parametrize("seed", [1, *(pytest.param(each, marks=pytest.mark.sweep) for each in (2, 3))])
@pytest.mark.parametrize("known", [True, False])
def test_where_guesses_do_not_pay_hardly_any_are_sent(
    vocab: int, trip_s: float, position_s: float, seed: int, known: bool
) -> None:
    """Random text: what occurred before says nothing of what comes."""
    rng = random.Random(seed)
    text = [rng.randrange(vocab) for _ in range(500)]
    compute_s = position_s if known else None
    plain = seconds_of(text, None, trip_s, position_s)
    assert seconds_of(text, Speculation(), trip_s, position_s, compute_s) < 1.05 * plain


def misleading(symbols: int) -> list[int]:
    """Text in which three tokens in a row never come twice, and two do: every copy is wrong in the end.

    By the greedy construction of a de Bruijn sequence (Martin, 1934).
    """
    text, met = [0] * 3, set[tuple[int, ...]]()
    while True:
        end = (text[-2], text[-1])
        following = next((each for each in reversed(range(symbols)) if (*end, each) not in met), None)
        if following is None:
            return text
        met.add((*end, following))
        text.append(following)


@pytest.mark.parametrize("tokens", [64, 128, 400])
@pytest.mark.parametrize(
    ("trip_s", "position_s"), [(0.25, 0.005), (0.25, 0.02), (0.25, 0.06), (0.05, 0.01), (0.2, 0.0)]
)
@pytest.mark.parametrize("compute", [None, 1.0, 0.25], ids=["unknown", "known", "hops are quicker"])
def test_no_text_takes_much_longer_with_guesses_than_without(
    tokens: int, trip_s: float, position_s: float, compute: float | None
) -> None:
    text = misleading(8)[: 20 + tokens]
    plain = seconds_of(text, None, trip_s, position_s)
    compute_s = compute and compute * position_s
    assert plain / seconds_of(text, Speculation(), trip_s, position_s, compute_s) > 0.96


@pytest.mark.parametrize("seed", [1, 2])
def test_where_a_position_costs_as_much_as_a_trip_only_a_few_are_tried(seed: int) -> None:
    text = repeating(random.Random(seed), 600)
    assert seconds_of(text, Speculation(), 0.0, 0.1) < 1.02 * seconds_of(text, None, 0.0, 0.1)


def test_the_cost_of_a_trip_is_found_from_trips() -> None:
    cost = TripCost()
    for positions in (1, 5, 1, 3, 9, 1):
        cost.note(positions, 0.25 + 0.01 * (positions - 1))
    assert cost.predict(17) == pytest.approx(0.25 + 0.16)
    for _ in range(2000):
        cost.note(1, 0.5)
    assert cost.predict(17) == pytest.approx(0.5 + 0.16)  # not forgotten meanwhile
    for _ in range(5):
        cost.note(4, 0.4)  # chance: more positions took less
    assert cost.predict(30) == cost.predict(1)


def test_a_line_that_was_slow_once_is_tried_again() -> None:
    speculation = Speculation()
    text = [1, 2, 3, 4, 5] * 10
    for seconds in [0.1] * 3 + [60.0] * 2 + [0.1] * 300:
        guesses = guesses_behind(speculation, text, 30)
        speculation.trips.append((1 + len(guesses), seconds))
        for _ in guesses:
            speculation.note_guess(right=True)
    assert len(guesses_behind(speculation, text, 30)) >= 8
    assert speculation.ahead(1)  # the rest follows


def test_a_setting_says_how_many() -> None:
    assert speculation_by("off") is None
    text = [1, 2, 3] * 10
    for setting, most in (("7", 7), ("32", MAX_DEPTH)):
        speculation = speculation_by(setting)
        assert speculation is not None
        assert len(guesses_behind(speculation, text, 100)) == most
        assert guesses_behind(speculation, text, 0) == ()
        assert len(guesses_behind(speculation, text, 2)) == 2
        assert guesses_behind(speculation, [*text, 9], 100) == ()  # nothing to copy from
    automatic = speculation_by("auto")
    assert automatic is not None
    assert guesses_behind(automatic, text, 100) == ()  # what a trip costs is not known yet


@pytest.mark.parametrize("wrong", ["on", "0", "33", "-1", "", "1.5", "²"])
def test_a_setting_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="it takes auto, off, or 1 to 32"):
        ClientConfig(speculate=wrong)


# ---------------------------------------------------------------------- the same text


@pytest.mark.parametrize(
    ("depth", "seed"),
    [
        *((1, 3), (5, 0), (MAX_DEPTH, 3), (None, 0)),
        *(
            pytest.param(*each, marks=pytest.mark.sweep)
            for each in ((1, 0), (5, 3), (MAX_DEPTH, 0), (None, 3))
        ),
    ],
)
async def test_the_text_is_the_one_without_guesses(
    depth: int | None, seed: int, checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a", 0, 3)
        await swarm.serve("b", 3, 8)
        walk = Walk(swarm, route_over(a=(0, 3), b=(3, 8)))
        options: dict[str, Any] = {"temperature": 1.0 if seed else 0.0, "seed": seed, "max_new_tokens": 60}
        generation = start(
            walk,
            swarm,
            ends,
            tokenizer,
            REPEATING,
            speculation=Speculation(depth),
            **options,
        )
        ids = [token.id async for token in generation]
        assert ids == local_ids(checkpoint, ends, tokenizer.encode(REPEATING), len(ids), seed=seed)
        stats = generation.result.speculation
        assert stats is not None
        if depth is not None:
            assert 0 < stats.accepted < stats.drafted
            assert stats.tokens_per_trip > 1
            assert len(stats.by_depth) <= depth
        assert stats.accepted == sum(right for _, right in stats.by_depth)
        assert generation.result.failovers == 0
        await swarm.all_closed()


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 4, "min_new_tokens": 30},
        {"temperature": 0.9, "seed": 5, "top_p": 0.9, "repetition_penalty": 1.1},
        {"stop": (" ball",)},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
    ],
)
async def test_rules_and_ends_are_those_without_guesses(
    options: dict[str, Any], checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    options = {"max_new_tokens": 40, **options}
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        results: list[tuple[Any, ...]] = []
        for speculation in (None, Speculation(6)):
            walk = Walk(swarm, route_over(a=(0, 8)))
            generation = start(walk, swarm, ends, tokenizer, REPEATING, speculation=speculation, **options)
            tokens = [token async for token in generation]
            results.append((tokens, generation.result.text, generation.result.finish_reason))
        assert results[0] == results[1]
        await swarm.all_closed()


async def test_a_token_that_was_cancelled_is_not_skipped(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    """The outputs that are left belong to positions behind it."""
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        walk = Walk(swarm, *[route_over(a=(0, 8))] * 10)
        generation = start(
            walk, swarm, ends, tokenizer, REPEATING, max_new_tokens=40, speculation=Speculation(8)
        )
        ids, cancelled = list[int](), 0
        while len(ids) < 40:
            if len(ids) % 10 == 7 and cancelled <= len(ids) // 10:
                cancelled += 1
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await anext(generation)
                assert scope.cancelled_caught
            ids.append((await anext(generation)).id)
        assert ids == local_ids(checkpoint, ends, tokenizer.encode(REPEATING), 40, seed=0)
        await generation.aclose()
        await swarm.all_closed()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drawn", "dies"),
    [
        ({}, 0),
        (DRAWN, -1),
        pytest.param({}, -1, marks=pytest.mark.sweep),
        pytest.param(DRAWN, 0, marks=pytest.mark.sweep),
    ],
)
async def test_a_hop_that_dies_changes_no_token(
    drawn: dict[str, Any], dies: int, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is replayed to the one that takes over holds the guesses that were wrong."""

    async def generate(swarm: MemorySwarm, client: Client, die_after: int | None) -> tuple[int, ...]:
        generation = client.generate(REPEATING, max_new_tokens=50, **drawn)
        for i in range(50):
            if i == die_after:
                await swarm.network.kill(generation.result.route[dies].peer_id)
            await anext(generation)
        if die_after is not None:
            assert generation.result.failovers == 1
        return generation.result.token_ids

    texts: list[tuple[int, ...]] = []
    for speculate, die_after in (("off", None), ("6", 11), ("6", 24)):
        async with open_memory_client(
            checkpoint,
            monkeypatch,
            tmp_path,
            config=ClientConfig(dtype="float32", speculate=speculate),
            audit=AuditConfig(rate=1.0),
            session_config=SessionConfig(slow_step_s=60.0),
        ) as (client, swarm):
            for name in ("a", "b"):
                await swarm.serve(f"first-{name}", 0, 4)
                await swarm.serve(f"last-{name}", 4, 8)
            texts.append(await generate(swarm, client, die_after))
            await client.audits_settled()
            assert client.audits.failed == client.audits.suspect == 0
            assert die_after is not None or client.audits.passed == 2
    assert texts[0] == texts[1] == texts[2]


def test_a_crowd_is_who_asked_lately() -> None:
    now = 0.0
    crowd, texts = Crowd(lambda: now), [Speculation() for _ in range(3)]
    assert [crowd.count(each) for each in texts] == [1, 2, 3]
    assert crowd.count(texts[0]) == 3
    now = 4.0
    assert crowd.count(texts[2]) == 3
    now = 7.0
    assert crowd.count(texts[2]) == 1


async def test_texts_one_after_the_other_are_no_crowd(open_client: OpenClient) -> None:
    async with open_client() as (client, swarm):
        await swarm.serve("a")
        kept: list[object] = []
        for _ in range(3):
            generation = client.generate(REPEATING, max_new_tokens=2)
            async for _ in generation:
                pass
            kept.append(generation)
        assert client.local.crowd.count(Speculation()) == 1


def test_a_text_that_is_dropped_is_not_counted() -> None:
    crowd, mine = Crowd(), Speculation()
    Speculation(crowd=crowd)
    assert crowd.count(mine) == 1


@pytest.mark.parametrize(("others", "sends"), [(7, True), (8, False)])
def test_in_a_crowd_near_its_hops_nobody_guesses(others: int, sends: bool) -> None:
    crowd, texts = Crowd(), [Speculation() for _ in range(others)]
    for each in texts:
        crowd.count(each)
    text = [*range(20)] * 8
    speculation = Speculation(crowd=crowd)
    seconds_of(text, speculation, 0.05, 0.001, compute_s=0.04)
    assert (speculation.stats(len(text)).drafted > 0) is sends
    with_depth = Speculation(3, crowd=crowd)
    seconds_of(text, with_depth, 0.05, 0.001, compute_s=0.04)
    assert with_depth.stats(len(text)).drafted > 0


@pytest.mark.parametrize(("others", "sends"), [(31, True), (32, False)])
def test_far_away_a_crowd_may_be_larger(others: int, sends: bool) -> None:
    crowd, texts = Crowd(), [Speculation() for _ in range(others)]
    for each in texts:
        crowd.count(each)
    speculation, text = Speculation(crowd=crowd), [*range(20)] * 4
    speculation.trips.append((1, 0.25))
    speculation.guess(text[:-1], text[-1], 8, 0.004, expected_s=0.25)
    assert bool(speculation.guess(text[:-1], text[-1], 8, 0.004, expected_s=0.25)) is sends
