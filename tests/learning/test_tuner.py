"""The four verbs over hops in memory, and a training that is killed and goes on."""

from __future__ import annotations

import json
import warnings
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import trio
from torch import Tensor

from p2pinfer.client_config import TuneConfig
from p2pinfer.errors import ConfigError, LocalError
from p2pinfer.learning import tuner as tuner_module
from p2pinfer.learning.examples import Example, make_example, prepare, read_data
from p2pinfer.learning.training_run import TrainingRun, fingerprint_of
from p2pinfer.learning.tuner import Tuner
from p2pinfer.learning.tuning import tuner_over
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead, load_embedding_and_head
from p2pinfer.models.text.text import Tokenizer, load_tokenizer

from ..node.memory_swarm import FLOAT32, MemorySwarm, open_memory_swarm
from .support import WAY, Peers

TEXTS = ["Tom has a cat.", "Lily has a small dog and a ball.", "Ben is sad.", "The sun is up in the sky."]
TARGETS = ("q_proj", "down_proj")


@dataclass(frozen=True)
class Parts:
    embedding_and_head: EmbeddingAndHead
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def parts(checkpoint: Checkpoint) -> Parts:
    return Parts(load_embedding_and_head(checkpoint, FLOAT32), load_tokenizer(checkpoint.folder))


@pytest.fixture(scope="module")
def examples(parts: Parts) -> list[Example]:
    return [make_example({"text": text}, parts.tokenizer, None) for text in TEXTS]


@asynccontextmanager
async def open_tuner(
    checkpoint: Checkpoint, parts: Parts, config: TuneConfig
) -> AsyncGenerator[tuple[Tuner, MemorySwarm]]:
    async with open_memory_swarm(checkpoint) as swarm:
        for peer_id, span in WAY.items():
            await swarm.serve(peer_id, *span)
        host = swarm.network.host("client")
        async with tuner_over(
            host, parts.embedding_and_head, parts.tokenizer, Peers(WAY), trio.Event, config
        ) as tuner:
            yield tuner, swarm


def by_transformers(
    checkpoint: Checkpoint, folder: Path, batches: list[list[Example]], config: TuneConfig
) -> tuple[list[float], list[Tensor]]:
    """Losses and final values of peft's adapter in `folder`, trained on one machine."""
    peft: Any = pytest.importorskip("peft")
    transformers: Any = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers what it renamed
        model = peft.PeftModel.from_pretrained(base, folder, is_trainable=config.method == "lora")
    kept = "lora_" if config.method == "lora" else "prompt_encoder"
    trained = [each.requires_grad_() for name, each in model.named_parameters() if kept in name]
    optimizer = torch.optim.AdamW(trained, lr=config.rate(0), weight_decay=0.0)
    losses: list[float] = []
    for batch in batches:
        total, count = torch.zeros(()), 0
        for each in batch:
            logits = model(input_ids=torch.tensor([each.token_ids])).logits[0, -len(each.token_ids) :]
            total = total + torch.nn.functional.cross_entropy(
                logits, torch.tensor(each.labels), reduction="sum"
            )
            count += each.targets
        loss: Any = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()) / count)
    return losses, [each.detach() for each in trained]


def are_alike(one: Tensor, other: Tensor) -> bool:
    """Within 1e-3 of the largest value, but for one value in fifty.

    Adam divides a gradient by its own size. Where a gradient is next to nothing, rounding decides about the
    step: another processor, another value.
    """
    apart = (one - other).abs()
    within = apart <= 1e-3 * other.abs().max()
    return bool(within.double().mean() >= 0.98 and (apart**2).sum() <= 4e-4 * (other**2).sum())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prompt"])
async def test_it_trains_as_transformers_and_peft_do_and_saves_what_they_load(
    checkpoint: Checkpoint, parts: Parts, examples: list[Example], tmp_path: Path, method: str
) -> None:
    config = TuneConfig(method=method, targets=TARGETS, rank=2, prompt_tokens=3, learning_rate=1e-2, seed=3)
    batches = [examples[:3], examples[1:], examples[:3]]
    async with open_tuner(checkpoint, parts, config) as (tuner, _):
        await tuner.save(tmp_path / "begun")
        losses: list[float] = []
        for batch in batches:
            tuner.forward_backward(batch[:1])  # in two halves, both under way
            tuner.forward_backward(batch[1:])
            losses.append((await tuner.optim_step()).loss)
        await tuner.save(tmp_path / "ended")
        mine = [each.detach() for each in tuner.adapter.parameters()]
    expected, theirs = by_transformers(checkpoint, tmp_path / "begun", batches, config)
    assert losses == pytest.approx(expected, rel=1e-4)
    for one, other in zip(mine, theirs, strict=True):
        assert are_alike(one, other)
    last, _ = by_transformers(checkpoint, tmp_path / "ended", batches[:1], config)
    assert last[0] < expected[0]


async def test_an_awaited_batch_tells_its_loss_and_cutting_it_changes_nothing(
    checkpoint: Checkpoint, parts: Parts, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TuneConfig(targets=TARGETS, rank=2)
    async with open_tuner(checkpoint, parts, config) as (tuner, _):
        whole = await tuner.forward_backward(examples)
        assert whole.predicted == sum(each.targets for each in examples)
        assert whole.tokens == sum(len(each.token_ids) for each in examples)
        monkeypatch.setattr(tuner_module, "MICROBATCH_TOKENS", 12)
        cut = await tuner.forward_backward(examples)
        assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
        step = await tuner.optim_step()
        assert step.loss == pytest.approx(whole.loss, rel=1e-5)
        assert step.predicted == 2 * whole.predicted


async def test_a_loss_of_ones_own_is_trained(
    checkpoint: Checkpoint, parts: Parts, examples: list[Example]
) -> None:
    def squares(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.gather(1, labels[:, None]) ** 2).sum()

    async with open_tuner(checkpoint, parts, TuneConfig(rank=2, learning_rate=1e-2)) as (tuner, _):
        first = await tuner.forward_backward(examples[:1], squares)
        await tuner.optim_step()
        assert (await tuner.forward_backward(examples[:1], squares)).loss < first.loss


async def test_it_samples_what_it_has_learnt(
    checkpoint: Checkpoint, parts: Parts, examples: list[Example]
) -> None:
    async with open_tuner(checkpoint, parts, TuneConfig(rank=2, learning_rate=3e-3)) as (tuner, _):
        for _ in range(12):
            tuner.forward_backward(examples[:1])
            await tuner.optim_step()
        assert (await tuner.sample("Tom has", max_new_tokens=4)).startswith(" a cat.")


async def test_a_failed_batch_changes_nothing_and_is_told_once(
    checkpoint: Checkpoint, parts: Parts, examples: list[Example]
) -> None:
    async with open_tuner(checkpoint, parts, TuneConfig(rank=2)) as (tuner, _):
        before = tuner.state()

        def broken(logits: Tensor, labels: Tensor) -> Tensor:
            raise LocalError("a loss that does not work")

        tuner.forward_backward(examples)
        tuner.forward_backward(examples, broken)
        with pytest.raises(LocalError, match="does not work"):
            await tuner.optim_step()
        assert all(torch.equal(each, tuner.state()[name]) for name, each in before.items())
        with pytest.raises(LocalError, match="without a batch"):
            await tuner.optim_step()
        with pytest.raises(ConfigError, match="without a token"):
            tuner.forward_backward([Example((1, 2), (-100, -100))])
        tuner.forward_backward(examples)
        await tuner.optim_step()


class Stop(Exception):
    """The end of a run that was killed."""


async def train(
    checkpoint: Checkpoint, parts: Parts, examples: list[Example], folder: Path, *, stop: int = 0
) -> list[float]:
    """Losses of a run that goes on from the folder's checkpoint, or is cut off after some steps."""
    config = TuneConfig(targets=TARGETS, rank=2, batch_rows=2, epochs=3, checkpoint_steps=2)
    async with open_tuner(checkpoint, parts, config) as (tuner, _):
        run = TrainingRun(tuner, examples, config, fingerprint_of(checkpoint.spec, "abc", config), folder)
        await run.resume()

        def look(progress: Any) -> None:
            assert progress.steps == 6
            if progress.step == stop:
                raise Stop

        try:
            await run.run(look)
        except Stop:
            run.losses.clear()
        return run.losses


@pytest.mark.slow
async def test_a_training_that_was_killed_goes_on_as_if_it_had_not_been(
    checkpoint: Checkpoint, parts: Parts, examples: list[Example], tmp_path: Path
) -> None:
    undisturbed = await train(checkpoint, parts, examples, tmp_path / "one")
    assert len(undisturbed) == 6
    await train(checkpoint, parts, examples, tmp_path / "two", stop=3)
    assert await train(checkpoint, parts, examples, tmp_path / "two") == undisturbed
    for name in ("adapter_config.json", "loss.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    files: Any = safetensors.torch
    ends: list[dict[str, Tensor]] = [
        files.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")
    ]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert not list(tmp_path.glob("*/*.tmp"))
    assert await train(checkpoint, parts, examples, tmp_path / "two") == undisturbed  # nothing is left to do


async def test_a_training_goes_on_only_with_its_own_settings(
    checkpoint: Checkpoint, parts: Parts, examples: list[Example], tmp_path: Path
) -> None:
    config = TuneConfig(rank=2, batch_rows=4)
    async with open_tuner(checkpoint, parts, config) as (tuner, _):
        own = fingerprint_of(checkpoint.spec, "abc", config)
        await TrainingRun(tuner, examples, config, own, tmp_path).run()
        for other, said in (
            (replace(own, rank=4), "rank = 2, and 4 is asked for"),
            (replace(own, data="def"), "the examples are not those"),
        ):
            with pytest.raises(ConfigError, match=said):
                await TrainingRun(tuner, examples, config, other, tmp_path).resume()
        (tmp_path / "checkpoint.safetensors").write_bytes(b"damaged")
        with pytest.raises(ConfigError, match="no checkpoint"):
            await TrainingRun(tuner, examples, config, own, tmp_path).resume()


def test_examples_are_read_from_lines_of_json(tmp_path: Path, parts: Parts) -> None:
    path, tokenizer = tmp_path / "data.jsonl", parts.tokenizer
    lines: list[Any] = [{"text": "Tom has a cat."}, {"prompt": "Tom has", "completion": " a dog."}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    found = prepare(read_data(path), tokenizer, None, 64)
    text, asked = found.examples
    assert tokenizer.decode(text.token_ids) == "Tom has a cat."
    assert text.token_ids[-1] in tokenizer.eos_ids
    assert text.labels == (*text.token_ids[1:], -100)
    known = len(tokenizer.encode("Tom has"))
    assert asked.labels[: known - 1] == (-100,) * (known - 1)
    assert tokenizer.decode(asked.labels[known - 1 : -2]) == " a dog."
    assert (found.cut, found.empty) == (0, 0)
    short = prepare(read_data(path), tokenizer, None, known)
    assert (len(short.examples), short.cut, short.empty) == (1, 2, 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no examples"),
        ("{", "line 1 is no JSON"),
        ("[1]", "line 1 is no JSON object"),
        (
            '{"text": "a"}\n{"txt": "a"}',
            "line 2 has no text, no prompt and completion, no messages; it has txt",
        ),
        ('{"prompt": "a"}', "has no text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "two messages or more"),
        ('{"messages": [1, 2]}', "a message is an object"),
        ('{"prompt": "a b c d e f g", "completion": "h"}', "nothing is left to predict"),
        ('{"messages": [{"role": "user"}, {"role": "assistant"}]}', "line 1: the model has no chat template"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path: Path, parts: Parts, content: str, said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        prepare(read_data(path), parts.tokenizer, None, 3)
