"""Windows of guesses in flight: when they are sent, and that the text stays the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pinfer import client as client_module
from p2pinfer.client import Client
from p2pinfer.client_config import AuditConfig, ClientConfig, SessionConfig
from p2pinfer.generation.draft import Draft, NgramDrafter
from p2pinfer.generation.generation import GenerationResult
from p2pinfer.generation.speculation import Speculation
from p2pinfer.generation.trip_cost import Crowd
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.text.text import Tokenizer
from p2pinfer.session.chain import ReplaySource
from p2pinfer.session.session import Session
from p2pinfer.session.terms import PLAIN, Packing

from ..memory_client import open_memory_client
from ..node.memory_swarm import MemorySwarm, open_memory_swarm, route_over
from .texts import PROMPT, Walk, local_ids, resume, start

COUNT = 60
GIVEN = 400
DRAWN: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}]


def know(monkeypatch: pytest.MonkeyPatch, text: Sequence[int], wrong_every: int) -> None:
    """Have guesses be what `text` says, but for every so-manieth position."""

    def draft(_: NgramDrafter, ids: Sequence[int], last_id: int, most: int) -> Draft:
        at = len(ids) + 1
        known = (token_id if i % wrong_every else (token_id + 1) % 100 for i, token_id in enumerate(text))
        return Draft(tuple(known)[at : at + max(0, most)], 16)

    monkeypatch.setattr(NgramDrafter, "draft", draft)


def plain(_: str, crowd: Crowd) -> None:
    """No speculation, whatever the setting."""


def four_in_flight(_: str, crowd: Crowd) -> Speculation:
    """Windows of four guesses, four of them under way wherever there are so many guesses."""
    return Speculation(4, in_flight=4)


# ---------------------------------------------------------------------- the same text


@pytest.mark.parametrize(
    ("wrong_every", "in_flight", "seed"),
    [
        *((3, 5, 0), (11, 2, 3), (17, 5, 0), (1000, 5, 3)),
        *(
            pytest.param(*each, marks=pytest.mark.sweep)
            for each in ((3, 5, 3), (11, 2, 0), (17, 5, 3), (1000, 5, 0))
        ),
    ],
)
async def test_the_text_is_the_one_without_windows(
    wrong_every: int,
    in_flight: int,
    seed: int,
    checkpoint: Checkpoint,
    ends: EmbeddingAndHead,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt_ids = tokenizer.encode(PROMPT)
    expected = local_ids(checkpoint, ends, prompt_ids, COUNT, seed)
    know(monkeypatch, [*prompt_ids, *expected], wrong_every)
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a", 0, 3)
        await swarm.serve("b", 3, 8)
        walk = Walk(swarm, route_over(a=(0, 3), b=(3, 8)))
        walk.chunk_tokens = 16
        drawn: dict[str, Any] = DRAWN[seed > 0]
        speculation = Speculation(4, in_flight=in_flight)
        generation = start(
            walk, swarm, ends, tokenizer, speculation=speculation, max_new_tokens=COUNT, **drawn
        )
        assert [token.id async for token in generation] == expected
        stats = generation.result.speculation
        assert stats is not None
        assert stats.in_flight > 1
        assert stats.accepted == sum(right for _, right in stats.by_depth)
        assert (stats.accepted < stats.drafted) == (wrong_every < COUNT)
        wrong = [at for at in range(len(prompt_ids), len(prompt_ids) + COUNT) if at % wrong_every == 0]
        if in_flight == 5:
            assert stats.tokens_per_trip >= COUNT / (
                2 * len(wrong) + 6
            )  # nothing is guessed behind new tokens
        assert (generation.result.failovers, walk.outcomes[0][1].ok) == (0, True)
        await swarm.all_closed()


class Busy(Walk):
    """Opens sessions in which somebody is about to take over, all the time."""

    async def open_session(
        self,
        tokens: int,
        excluded: frozenset[str],
        replay_source: ReplaySource,
        *,
        packing: Packing = PLAIN,
    ) -> Session:
        session = await super().open_session(tokens, excluded, replay_source, packing=packing)
        await session.handovers.busy.acquire()
        return session


async def test_no_window_is_sent_while_a_hop_is_to_be_replaced(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for that, and the trip before it would have no time limit meanwhile."""
    prompt_ids = tokenizer.encode(PROMPT)
    expected = local_ids(checkpoint, ends, prompt_ids, 30, seed=0)
    know(monkeypatch, [*prompt_ids, *expected], 1000)
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        walk = Busy(swarm, route_over(a=(0, 8)))
        walk.chunk_tokens = 16
        speculation = Speculation(4, in_flight=4)
        generation = start(walk, swarm, ends, tokenizer, speculation=speculation, max_new_tokens=30)
        assert [token.id async for token in generation] == expected
        stats = generation.result.speculation
        assert stats is not None
        assert stats.in_flight == 1
        assert stats.accepted > 0
        await swarm.all_closed()


async def test_what_was_cancelled_and_what_is_resumed_goes_on_where_it_was(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt_ids = tokenizer.encode(PROMPT)
    expected = local_ids(checkpoint, ends, prompt_ids, COUNT, seed=0)
    know(monkeypatch, [*prompt_ids, *expected], 13)
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        walk = Walk(swarm, *[route_over(a=(0, 8))] * 3)
        walk.chunk_tokens = 16
        speculation = Speculation(4, in_flight=4)
        generation = start(walk, swarm, ends, tokenizer, speculation=speculation, max_new_tokens=COUNT)
        ids = [(await anext(generation)).id for _ in range(21)]
        with trio.CancelScope() as scope:
            scope.cancel()
            await anext(generation)
        ids += [(await anext(generation)).id for _ in range(9)]
        token = generation.resume_token
        await generation.aclose()
        rest = [each.id async for each in resume(walk, swarm, ends, tokenizer, token)]
        assert [*ids, *rest] == expected
        await swarm.all_closed()


async def generate(
    client: Client, swarm: MemorySwarm, kill: tuple[int, int] | None, **options: Any
) -> tuple[int, ...]:
    """A text; at its token `kill[0]` the hop at `kill[1]` dies."""
    generation = client.generate(PROMPT, **options)
    count = 0
    async for _ in generation:
        count += 1
        if kill is not None and count == kill[0]:
            await swarm.network.kill(generation.result.route[kill[1]].peer_id)
    assert generation.result.failovers == (kill is not None)
    return generation.result.token_ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drawn", "kills"), [(DRAWN[0], (None, None, (11, 0))), (DRAWN[1], (None, (30, -1)))]
)
async def test_a_hop_that_dies_between_windows_changes_no_token_and_no_audit(
    drawn: dict[str, Any],
    kills: Sequence[tuple[int, int] | None],
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Windows that were right, dropped and sent again all have receipts, or none; audits pass."""
    texts: list[tuple[int, ...]] = []
    for kill in kills:
        monkeypatch.setattr(client_module, "speculation_by", plain if not texts else four_in_flight)
        async with open_memory_client(
            checkpoint,
            monkeypatch,
            tmp_path,
            config=ClientConfig(dtype="float32", draft="off"),
            audit=AuditConfig(rate=1.0),
            session_config=SessionConfig(slow_step_s=60.0),
        ) as (client, swarm):
            for name in ("a", "b"):
                await swarm.serve(f"first-{name}", 0, 4)
                await swarm.serve(f"last-{name}", 4, 8)
            ids = await generate(client, swarm, kill, max_new_tokens=COUNT, **drawn)
            await client.audits_settled()
            assert client.audits.failed == client.audits.suspect == 0
            assert kill is not None or client.audits.passed == 2
        texts.append(ids)
        if len(texts) == 1:
            know(monkeypatch, [*tokenizer.encode(PROMPT), *ids], 9)
    assert set(texts) == {texts[0]}
    assert len(texts[0]) == COUNT


async def test_hops_keep_a_text_that_ended_with_windows_under_way(
    checkpoint: Checkpoint, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The next question of a chat begins behind it."""
    prompt = PROMPT + " there was a cat. The cat was black. The dog was brown." * 5
    monkeypatch.setattr(client_module, "speculation_by", four_in_flight)
    async with open_memory_client(
        checkpoint, monkeypatch, tmp_path, config=ClientConfig(dtype="float32", draft="off")
    ) as (client, swarm):
        await swarm.serve("a", 0, 4)
        await swarm.serve("b", 4, 8)
        whole = client.generate(prompt, max_new_tokens=COUNT)
        ids = [token.id async for token in whole]
        know(monkeypatch, [*tokenizer.encode(prompt), *ids, *ids], 1000)
        stopped = client.generate(prompt, max_new_tokens=COUNT, stop_ids=(ids[20],))
        before = [token.id async for token in stopped]
        assert before[: ids.index(ids[20])] == ids[: ids.index(ids[20])]
        assert len(before) < COUNT
        again = client.generate(prompt + stopped.result.text + " Then", max_new_tokens=4)
        _ = [token async for token in again]
        assert again.result.reused_tokens >= len(tokenizer.encode(prompt)) - 1
        await swarm.all_closed()


async def test_a_client_without_weights_has_windows_in_flight_as_well(
    checkpoint: Checkpoint,
    ends: EmbeddingAndHead,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The last hop draws for every position of a window, dropped or not; receipts and draws are in order."""
    results: list[GenerationResult] = []
    for speculate in (plain, four_in_flight):
        monkeypatch.setattr(client_module, "speculation_by", speculate)
        config = ClientConfig(dtype="float32", draft="off", thin="on")
        async with open_memory_client(checkpoint, monkeypatch, tmp_path, config=config) as (client, swarm):
            await swarm.serve("a", 0, 4, ends=ends)
            await swarm.serve("b", 4, 8, ends=ends)
            generation = client.generate(PROMPT, max_new_tokens=COUNT, **DRAWN[1])
            async for _ in generation:
                pass
            await swarm.all_closed()
        results.append(generation.result)
        know(monkeypatch, [*tokenizer.encode(PROMPT), *results[0].token_ids], 11)
    assert results[0].token_ids == results[1].token_ids
    assert results[1].speculation is not None
    assert results[1].speculation.in_flight > 1
    assert results[1].failovers == 0


# ---------------------------------------------------------------------- when they pay


class Chain:
    """Hops far apart, each of which computes one window after the other."""

    def __init__(self, trip_s: float, position_s: float, hops: int = 4) -> None:
        self.now = 0.0
        self._line_s = trip_s / (hops + 1)
        self._position_s = position_s / hops
        self._free_at = [0.0] * hops

    def send(self, positions: int) -> float:
        """Send a window; returns when its outputs are back."""
        at = self.now
        for hop, free_at in enumerate(self._free_at):
            at = max(at + self._line_s, free_at) + positions * self._position_s
            self._free_at[hop] = at
        return at + self._line_s


def seconds_of(text: list[int], speculation: Speculation, chain: Chain) -> float:
    """Time that a text takes over a chain, its first `GIVEN` tokens given."""
    length = GIVEN
    while length < len(text):
        guesses = speculation.guess(text[: length - 1], text[length - 1], len(text) - length - 1)
        windows = [(1 + len(guesses), chain.send(1 + len(guesses)))]
        presumed, began_at, is_first = list(guesses), chain.now, True
        while windows:
            while guesses and (more := speculation.ahead(len(windows))):
                windows.append((len(more), chain.send(len(more))))
                presumed += more
            waited_from = chain.now
            positions, back_at = windows.pop(0)
            chain.now = max(chain.now, back_at)
            if is_first:
                speculation.trips.append((positions, chain.now - began_at))
            else:
                speculation.windows.append((positions, chain.now - waited_from))
            is_first = False
            for _ in range(positions):
                length += 1
                if not presumed or length > len(text):
                    break
                right = presumed.pop(0) == text[length - 1]
                speculation.note_guess(right=right)
                if not right:
                    windows.clear()
                    break
            if length >= len(text):
                break
    return chain.now


def quoting(rng: random.Random, count: int, run: int) -> list[int]:
    """Text that goes on quoting itself, some `run` tokens at a time."""
    text = [rng.randrange(500) for _ in range(GIVEN)]
    while len(text) < count:
        begin = rng.randrange(len(text) - 2 * run)
        text += [rng.randrange(500), *text[begin : begin + rng.randrange(run, 2 * run)]]
    return text[:count]


@pytest.mark.parametrize("trip_s", [0.05, 0.25, 0.6])
@pytest.mark.parametrize("position_s", [0.004, 0.012])
def test_long_copies_take_far_less_time_with_windows_in_flight(trip_s: float, position_s: float) -> None:
    text = quoting(random.Random(1), 2000, 120)
    alone = seconds_of(text, Speculation(in_flight=1), Chain(trip_s, position_s))
    assert seconds_of(text, Speculation(), Chain(trip_s, position_s)) < alone / 1.2


@pytest.mark.parametrize("trip_s", [0.002, 0.05, 0.25])
@pytest.mark.parametrize("position_s", [0.002, 0.012, 0.05])
@pytest.mark.parametrize("run", [3, 10, 30])
def test_no_text_takes_longer_with_them(trip_s: float, position_s: float, run: int) -> None:
    text = quoting(random.Random(run), 1200, run)
    alone = seconds_of(text, Speculation(in_flight=1), Chain(trip_s, position_s))
    assert seconds_of(text, Speculation(), Chain(trip_s, position_s)) < 1.05 * alone


def test_no_more_are_under_way_than_keep_all_hops_at_work() -> None:
    """At a twentieth of a second a window, and a quarter a trip, five or six are as good as sixteen."""
    speculation, text = Speculation(), [*range(400), *range(400)]
    for _ in range(3):
        assert speculation.guess(text[:10], text[10], 300) == ()
        speculation.trips.append((1, 0.25))
    for at in range(420, 480):
        guesses = speculation.guess(text[:at], text[at], 300)
        speculation.trips.append((1 + len(guesses), 0.25 + 0.006 * len(guesses)))
        for _ in guesses:
            speculation.note_guess(right=True)
    assert speculation.guess(text[:480], text[480], 300)
    under_way = 1
    while speculation.ahead(under_way):
        under_way += 1
    assert 4 <= under_way <= 8


def test_far_away_the_first_trip_tells_enough_where_lines_are_known() -> None:
    """Three plain trips and two trials are a second and more at 250 ms, and a twelfth of 64 tokens."""
    text = [*range(100, 180), *range(100, 140)]
    for expected_s, is_enough in ((0.24, True), (0.03, False), (None, False)):
        speculation = Speculation()
        speculation.trips.append((1, 0.25))
        guesses = speculation.guess(text[:-1], text[-1], 60, 0.01, expected_s=expected_s)
        assert (len(guesses) >= 8) == is_enough
    near = Speculation()
    near.trips.append((1, 0.25))  # a first trip that met cold caches, where the line says 12 ms
    assert near.guess(text[:-1], text[-1], 60, 0.01, expected_s=0.012) == ()


def test_nothing_is_guessed_behind_an_end_of_the_text() -> None:
    speculation = Speculation(30, end_ids=frozenset({7}))
    text = [1, 2, 3, 4, 7, 5, 6, 1, 2, 3]
    assert speculation.guess(text[:-1], text[-1], 60) == (4, 7)
