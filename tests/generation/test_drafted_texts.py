"""Draft models beside real ones: the text is the same, and what fails costs no token."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
from torch import Tensor

from p2pinfer.client_config import ClientConfig
from p2pinfer.errors import ConfigError
from p2pinfer.generation.draft_model import DraftModel, ModelDrafter, check_tokenizers
from p2pinfer.generation.speculation import Speculation
from p2pinfer.local_model import load_draft_model
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.model_source import FolderSource
from p2pinfer.models.checkpoint.source import BUNDLED_DRAFTER, bundled_drafter_of
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.text.text import Tokenizer, load_tokenizer

from ..memory_client import open_memory_client
from ..node.memory_swarm import FLOAT32, open_memory_swarm, route_over
from .texts import PROMPT, Walk, local_ids, start

# ---------------------------------------------------------------------- the model's guesses


def first_blocks(tiny_stories: Path, folder: Path, blocks: int = 2, **config: Any) -> Path:
    """A model folder: the bundled model's first blocks, which now and then guess what all of them say."""
    weights: dict[str, Tensor] = {}
    for shard in sorted(tiny_stories.glob("*.safetensors")):
        weights |= cast("Any", safetensors.torch).load_file(shard)
    kept = {
        name: tensor
        for name, tensor in weights.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < blocks
    }
    folder.mkdir()
    cast("Any", safetensors.torch).save_file(kept, folder / "model.safetensors")
    said = json.loads((tiny_stories / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"num_hidden_layers": blocks} | config))
    shutil.copy(tiny_stories / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def weak_folder(tiny_stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_blocks(tiny_stories, tmp_path_factory.mktemp("weak") / "model")


def draft_model(folder: Path, tiny_stories: Path, cache_dir: Path) -> DraftModel:
    source = FolderSource(tiny_stories, cache_dir=cache_dir)
    draft = FolderSource(folder, cache_dir=cache_dir)
    return load_draft_model(draft, source, load_tokenizer(tiny_stories), FLOAT32, None)


@pytest.fixture(params=["the model itself", "its first blocks"])
def drafts(
    request: pytest.FixtureRequest, tiny_stories: Path, weak_folder: Path, tmp_path: Path
) -> tuple[DraftModel, bool]:
    """A draft model, and whether it is as good as can be."""
    best = request.param == "the model itself"
    return draft_model(tiny_stories if best else weak_folder, tiny_stories, tmp_path), best


@pytest.mark.parametrize(("depth", "seed"), [(5, 3), (None, 0)])
async def test_the_text_is_the_one_without_a_draft_model(
    depth: int | None,
    seed: int,
    drafts: tuple[DraftModel, bool],
    checkpoint: Checkpoint,
    ends: EmbeddingAndHead,
    tokenizer: Tokenizer,
) -> None:
    model, best = drafts
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a", 0, 3)
        await swarm.serve("b", 3, 8)
        walk = Walk(swarm, route_over(a=(0, 3), b=(3, 8)))
        walk.chunk_tokens = 16
        options: dict[str, Any] = {"temperature": 1.0 if seed else 0.0, "seed": seed, "max_new_tokens": 30}
        generation = start(
            walk, swarm, ends, tokenizer, speculation=Speculation(depth), draft_model=model, **options
        )
        ids = [token.id async for token in generation]
        assert ids == local_ids(checkpoint, ends, tokenizer.encode(PROMPT), len(ids), seed=seed)
        stats = generation.result.speculation
        assert stats is not None
        if depth is not None:
            assert stats.drafted > 20
            assert best == all(looked_at == right for looked_at, right in stats.by_depth)
            assert not best or stats.tokens_per_trip > 4
        await swarm.all_closed()


async def test_a_draft_model_goes_by_the_rules_of_the_text(
    tiny_stories: Path,
    tmp_path: Path,
    checkpoint: Checkpoint,
    ends: EmbeddingAndHead,
    tokenizer: Tokenizer,
) -> None:
    """The model itself, as it is drawn from, guesses every token of its own."""
    model = draft_model(tiny_stories, tiny_stories, tmp_path)
    options: dict[str, Any] = {"temperature": 0.9, "seed": 5, "top_p": 0.9, "top_k": 40}
    options |= {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 20}
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        texts: list[tuple[int, ...]] = []
        for given in (None, model):
            speculation = None if given is None else Speculation(6)
            walk = Walk(swarm, route_over(a=(0, 8)))
            walk.chunk_tokens = 16
            generation = start(
                walk,
                swarm,
                ends,
                tokenizer,
                speculation=speculation,
                draft_model=given,
                max_new_tokens=25,
                **options,
            )
            texts.append(tuple([token.id async for token in generation]))
            stats = generation.result.speculation
        assert texts[0] == texts[1]
        assert stats is not None
        assert all(looked_at == right for looked_at, right in stats.by_depth)
        await swarm.all_closed()


def greedy(logits: Tensor, _: Sequence[int]) -> int:
    return int(logits.argmax())


def taken(drafter: ModelDrafter, text: Sequence[int], count: int) -> list[tuple[int, float]]:
    guesses = drafter.guesses(text[:-1], text[-1])
    return [next(guesses) for _ in range(count)]


def test_guesses_behind_wrong_ones_are_those_of_a_drafter_that_never_made_them(
    weak_folder: Path, tiny_stories: Path, tmp_path: Path
) -> None:
    model = draft_model(weak_folder, tiny_stories, tmp_path)
    rng = random.Random(2)
    text, drafter = [1, *(rng.randrange(3, 4000) for _ in range(530))], ModelDrafter(model, 900, greedy)
    while len(text) < 560:
        count = rng.randrange(1, 6)
        guesses = taken(drafter, text, count)
        fresh = taken(ModelDrafter(model, 900, greedy), text, count)
        assert [token_id for token_id, _ in guesses] == [token_id for token_id, _ in fresh]
        assert [p for _, p in guesses] == pytest.approx([p for _, p in fresh], rel=1e-3)
        right = rng.randrange(count + 1)
        text += [token_id for token_id, _ in guesses[:right]]
        text += [rng.randrange(3, 4000) for _ in range(rng.randrange(1, 4))]


def test_guesses_end_where_the_draft_model_s_context_does(tiny_stories: Path, tmp_path: Path) -> None:
    folder = first_blocks(tiny_stories, tmp_path / "short", 1, max_position_embeddings=64)
    drafter = ModelDrafter(draft_model(folder, tiny_stories, tmp_path), 900, greedy)
    text = list(range(3, 63))
    assert len([*drafter.guesses(text[:-1], text[-1])]) == 4
    assert [*drafter.guesses([*text, 9, 9, 9], 9)] == []
    assert [*drafter.guesses([*text, *text], 9)] == []


def test_a_text_is_not_held_up_by_the_drafts_of_others(
    weak_folder: Path, tiny_stories: Path, tmp_path: Path
) -> None:
    """Hundreds of texts that waited for their turn took all threads, and could not be cancelled there."""
    model, text = draft_model(weak_folder, tiny_stories, tmp_path), [1, 5, 6, 7]
    one, other, third = (ModelDrafter(model, 900, greedy) for _ in range(3))
    begun = [each.guesses(text[:-1], text[-1]) for each in (one, other)]
    expected = [next(each) for each in begun]
    assert [*third.guesses(text[:-1], text[-1])] == []
    del begun[-1]  # which ends its draft
    assert taken(third, text, 1) == expected[:1]


async def test_a_draft_model_that_fails_costs_no_token(
    weak_folder: Path,
    tiny_stories: Path,
    tmp_path: Path,
    checkpoint: Checkpoint,
    ends: EmbeddingAndHead,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = draft_model(weak_folder, tiny_stories, tmp_path)
    logits, left = model.ends.logits, 20

    def fail_in_time(hidden: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("out of memory")
        return logits(hidden)

    monkeypatch.setattr(model.ends, "logits", fail_in_time)
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        walk, speculation = Walk(swarm, route_over(a=(0, 8))), Speculation(4)
        generation = start(
            walk, swarm, ends, tokenizer, speculation=speculation, draft_model=model, max_new_tokens=40
        )
        ids = [token.id async for token in generation]
        assert ids == local_ids(checkpoint, ends, tokenizer.encode(PROMPT), len(ids), seed=0)
        assert speculation.drafter is None
        assert "going on without it: out of memory" in caplog.text


# ---------------------------------------------------------------------- whose guesses


def other_tokenizer(folder: Path) -> None:
    """Exchange two tokens."""
    path = folder / "tokenizer.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    vocab = said["model"]["vocab"]
    names = [name for name, token_id in vocab.items() if token_id in (500, 501)]
    vocab[names[0]], vocab[names[1]] = vocab[names[1]], vocab[names[0]]
    path.write_text(json.dumps(said), encoding="utf-8")


def test_a_tokenizer_that_differs_is_told(tiny_stories: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = first_blocks(tiny_stories, tmp_path / "other", 1)
    check_tokenizers("small", load_tokenizer(folder), "large", tokenizer)
    other_tokenizer(folder)
    with pytest.raises(ConfigError, match=r"small cannot draft for large.* token 500 is") as told:
        check_tokenizers("small", load_tokenizer(folder), "large", tokenizer)
    assert repr(tokenizer.piece(500)) in str(told.value)


@pytest.mark.parametrize(("heat", "least"), [(0.0, 2.2), (0.7, 1.6)])
async def test_the_bundled_model_s_own_drafter_saves_it_trips(
    heat: float,
    least: float,
    tiny_stories: Path,
    tmp_path: Path,
    checkpoint: Checkpoint,
    ends: EmbeddingAndHead,
    tokenizer: Tokenizer,
) -> None:
    """Far below its average, which is 5.9 and 3.9 with eight guesses: texts differ, and rounding."""
    folder = tiny_stories.with_name(bundled_drafter_of(tiny_stories))
    model = draft_model(folder, tiny_stories, tmp_path)
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        walk = Walk(swarm, route_over(a=(0, 8)))
        walk.chunk_tokens = 16
        options: dict[str, Any] = {"temperature": heat, "seed": 1, "max_new_tokens": 60}
        generation = start(
            walk, swarm, ends, tokenizer, speculation=Speculation(8), draft_model=model, **options
        )
        _ = [token.id async for token in generation]
        stats = generation.result.speculation
        assert stats is not None
        assert stats.tokens_per_trip > least
        await swarm.all_closed()


def test_only_the_bundled_model_has_a_bundled_drafter(tiny_stories: Path, tmp_path: Path) -> None:
    """A folder of that name may hold anything."""
    (tmp_path / "tiny-stories").mkdir()
    assert bundled_drafter_of(tiny_stories) == BUNDLED_DRAFTER
    assert bundled_drafter_of(tmp_path / "tiny-stories") == ""


@pytest.mark.slow
async def test_a_client_checks_and_uses_the_draft_model_that_it_is_given(
    tiny_stories: Path, tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = first_blocks(tiny_stories, tmp_path / "small", 2)
    config = ClientConfig(dtype="float32", speculate="4", draft="off")
    texts: list[tuple[int, ...]] = []
    drafted: list[int] = []
    for draft in ("off", str(folder)):
        async with open_memory_client(
            checkpoint, monkeypatch, tmp_path, config=replace(config, draft=draft)
        ) as (client, swarm):
            await swarm.serve("a")
            generation = client.generate("Once upon a time", max_new_tokens=20, temperature=1.0, seed=4)
            texts.append(tuple([token.id async for token in generation]))
            assert generation.result.speculation is not None
            drafted.append(generation.result.speculation.drafted)
    assert texts[0] == texts[1]
    assert drafted[0] < 30 < drafted[1]
    other_tokenizer(folder)
    with pytest.raises(ConfigError, match="their tokenizers differ"):
        async with open_memory_client(
            checkpoint, monkeypatch, tmp_path, config=replace(config, draft=str(folder))
        ):
            pass


def test_a_drafter_that_is_unsure_is_not_asked_at_every_trip() -> None:
    """Its guesses are not worth sending, and finding them takes as long as a token does."""

    class Unsure:
        guess_s = 0.01
        asked = 0

        def guesses(self, ids: Sequence[int], last_id: int) -> Iterator[tuple[int, float]]:
            self.asked += 1
            yield from ((1, 0.01) for _ in range(8))

    speculation, drafter = Speculation(), Unsure()
    speculation.drafter = drafter
    for number in range(60):
        assert not speculation.guess(range(1000, 1000 + number), 2000 + number, 8, 0.01)
        speculation.trips.append((1, 0.012))
    assert 1 <= drafter.asked <= 3
