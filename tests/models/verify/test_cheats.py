"""Each cheat of benchmarks/detect_cheats.py on two sessions of the bundled model; figures are there."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import SpanRunner, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.text import load_tokenizer
from p2pinfer.models.verify.deviation import Deviation
from p2pinfer.models.verify.noise_floor import NoiseFloor
from p2pinfer.models.verify.reference import Tail, open_reference, open_tail
from p2pinfer.models.verify.sessions import run_session
from p2pinfer.models.verify.verify import compare, rerun
from p2pinfer.reputation.verdict import Verdict, judge

STORIES = (
    "Once upon a time, there was a little fox who lived in a big forest. He had a red ball and he liked to "
    "play with it every day. One day, the ball fell into the river. The fox was sad and he began to cry. A "
    "duck saw him and said, 'Why are you sad, little fox?' The fox said, 'My ball is in the river and I can "
    "not swim.' The duck smiled. She swam to the ball and pushed it with her beak. Soon the ball was on the",
    "One rainy day, Sara and her brother Ben were at home. They wanted to go to the park, but it was "
    "too wet. So they took a big box and some paper. Ben made a door and Sara made two windows. It was a "
    "house for their toys! The bear got a bed, and the robot got a chair. Then dad came in with milk. He "
    "looked at the house and said, 'What a nice home! Can I live there too?' They all laughed and laughed.",
)
SPAN = BlockSpan(2, 6)


def _load_script() -> ModuleType:
    """benchmarks/cheats.py, loaded by its path: scripts are no package, and the tests may run on a wheel."""
    path = Path(__file__).parents[3] / "benchmarks" / "cheats.py"
    spec = importlib.util.spec_from_file_location("cheats", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cheats = _load_script()


@pytest.fixture(scope="module")
def runner(checkpoint: Checkpoint) -> SpanRunner:
    """The span as the published weights make it, in bfloat16."""
    return open_runner(checkpoint, SPAN, ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 24))


@pytest.fixture(scope="module")
def inputs(checkpoint: Checkpoint) -> list[Tensor]:
    """What enters the span in two sessions, 97 tokens each."""
    tokenizer = load_tokenizer(checkpoint.folder)
    config = ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 24)
    before = open_runner(checkpoint, BlockSpan(0, SPAN.start), config)
    ends = load_embedding_and_head(checkpoint, config)
    return [run_session(before, ends.embed(tokenizer.encode(story)[:97])) for story in STORIES]


@pytest.fixture(scope="module")
def floors(checkpoint: Checkpoint, inputs: Sequence[Tensor]) -> list[NoiseFloor]:
    reference = open_reference(checkpoint, SPAN, max_tokens=97)
    return [rerun(reference, SPAN, each, torch.bfloat16) for each in inputs]


@pytest.fixture(scope="module")
def honest(runner: SpanRunner, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [run_session(runner, each) for each in inputs]


@pytest.fixture(scope="module")
def tail(checkpoint: Checkpoint) -> Tail:
    return open_tail(checkpoint, SPAN, max_tokens=97)


def verdicts(
    floors: Sequence[NoiseFloor], outputs: Sequence[Tensor], tail: Tail | None = None
) -> set[Verdict]:
    """What is said of each chunk of 32 tokens by itself."""
    found: set[Verdict] = set()
    for floor, output in zip(floors, outputs, strict=True):
        got = output.to(torch.bfloat16).float()
        chunks = compare(floor, got, range(len(got)), tail).chunks
        assert [chunk.tokens for chunk in chunks] == [32, 32, 32]
        found |= {judge(Deviation((chunk,))).verdict for chunk in chunks}
    return found


def test_published_weights_pass(floors: Sequence[NoiseFloor], honest: Sequence[Tensor], tail: Tail) -> None:
    assert verdicts(floors, honest, tail) == {Verdict.PASS}


@pytest.mark.parametrize("name", cheats.WEIGHTS)
def test_altered_weights_fail_in_every_chunk(
    name: str, checkpoint: Checkpoint, inputs: Sequence[Tensor], floors: Sequence[NoiseFloor]
) -> None:
    outputs = cheats.run_altered(checkpoint, SPAN, cheats.WEIGHTS[name], inputs)
    assert verdicts(floors, outputs) == {Verdict.FAIL}


@pytest.mark.parametrize("parts", [cheats.skipped(SPAN), cheats.swapped(SPAN)])
def test_other_blocks_fail_in_every_chunk(
    parts: Sequence[BlockSpan], runner: SpanRunner, inputs: Sequence[Tensor], floors: Sequence[NoiseFloor]
) -> None:
    outputs = [cheats.run_parts(runner, each, parts) for each in inputs]
    assert verdicts(floors, outputs) == {Verdict.FAIL}


def test_the_input_or_another_sessions_output_fails_in_every_chunk(
    inputs: Sequence[Tensor], honest: Sequence[Tensor], floors: Sequence[NoiseFloor]
) -> None:
    assert verdicts(floors, inputs) == {Verdict.FAIL}
    assert verdicts(floors, honest[::-1]) == {Verdict.FAIL}


def test_noise_of_a_hundredth_fails_in_every_chunk(
    honest: Sequence[Tensor], floors: Sequence[NoiseFloor]
) -> None:
    assert verdicts(floors, [cheats.with_noise(each, 1e-2) for each in honest]) == {Verdict.FAIL}


def test_one_wrong_token_in_32_fails_in_every_chunk(
    runner: SpanRunner, inputs: Sequence[Tensor], honest: Sequence[Tensor], floors: Sequence[NoiseFloor]
) -> None:
    wrong = [cheats.run_parts(runner, each, cheats.skipped(SPAN)) for each in inputs]
    outputs = [cheats.tampered(good, bad) for good, bad in zip(honest, wrong, strict=True)]
    assert verdicts(floors, outputs) == {Verdict.FAIL}


def test_a_wrong_first_token_fails(
    inputs: Sequence[Tensor], honest: Sequence[Tensor], floors: Sequence[NoiseFloor]
) -> None:
    for given, good, floor in zip(inputs, honest, floors, strict=True):
        outputs = good.clone().float()
        outputs[0] = given[0]
        deviation = compare(floor, outputs, range(len(outputs)))
        assert judge(deviation).verdict is Verdict.FAIL


@pytest.mark.parametrize("ratio", [0.8, 1.1])
def test_a_push_towards_another_token_passes_every_norm_and_fails_by_its_logits(
    ratio: float,
    checkpoint: Checkpoint,
    floors: Sequence[NoiseFloor],
    tail: Tail,
) -> None:
    attack = cheats.Aim(checkpoint.folder, SPAN)
    pushed = [attack.push(floor, ratio) for floor in floors]
    assert Verdict.FAIL not in verdicts(floors, pushed)
    assert verdicts(floors, pushed, tail) == {Verdict.FAIL}
