from __future__ import annotations

import ctypes
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2pinfer.errors import SpanOutOfRange
from p2pinfer.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead, load_embedding_and_head
from p2pinfer.models.compute.runner import Chunk, SpanRunner, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan

from ...clear import clear_choices

Oracle = Callable[..., PreTrainedModel]

PAGE = 16
FLOAT32 = ComputeConfig(device="cpu", dtype="float32", cache_bytes=1 << 23, page_tokens=PAGE)
PROMPT_TOKENS = (1, PAGE, 3 * PAGE + 1, 129, 700)
CHUNK_TOKENS = (1, 5, PAGE, 50, 256)
NEW_TOKENS = 12


class Chain:
    """A model cut into spans that hand float32 tensors on, as hops do over the wire."""

    def __init__(
        self, checkpoint: Checkpoint, boundaries: Sequence[int], config: ComputeConfig = FLOAT32
    ) -> None:
        spans = [BlockSpan(*pair) for pair in pairwise(boundaries)]
        self.runners = [open_runner(checkpoint, span, config) for span in spans]
        self.ends: EmbeddingAndHead = load_embedding_and_head(checkpoint, config)

    def reserve(self, max_tokens: int) -> list[CacheLease]:
        return [runner.cache.reserve(max_tokens) for runner in self.runners]

    def run(self, steps: Sequence[tuple[list[CacheLease], int, Sequence[int]]]) -> list[Tensor]:
        """Logits of every token of each (leases, position, token ids), all in one batch."""
        states = [self.ends.embed(ids) for _, _, ids in steps]
        for index, runner in enumerate(self.runners):
            states = runner.run(
                [
                    Chunk(leases[index], position, hidden.float())
                    for (leases, position, _), hidden in zip(steps, states, strict=True)
                ]
            )
        return [self.ends.logits(hidden) for hidden in states]


class Session:
    """One session on its way: a prompt that goes in by chunks, then one token after the other."""

    def __init__(self, chain: Chain, prompt: list[int], chunk_tokens: int) -> None:
        self.leases = chain.reserve(len(prompt) + NEW_TOKENS)
        self.waiting = prompt
        self.chunk_tokens = chunk_tokens
        self.position = 0
        self.new: list[int] = []


def prompt(tokens: int, vocab: int = 199) -> list[int]:
    rng = random.Random(tokens)
    return [rng.randrange(3, vocab) for _ in range(tokens)]


def continuation(model: PreTrainedModel, ids: list[int], tokens: int) -> list[int]:
    """What transformers generates."""
    generate: Any = model.generate
    batch = torch.tensor([ids])
    with torch.inference_mode():
        output = generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
        )
    return list(output[0, len(ids) :].tolist())


def logits_of(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids])).logits
    return logits[0].float()


def decode_together(chain: Chain, prompts: Sequence[list[int]], chunks: Sequence[int]) -> list[list[int]]:
    """Greedy continuations of several sessions, each round of which is one batch of whatever is next."""
    sessions = [Session(chain, ids, size) for ids, size in zip(prompts, chunks, strict=True)]
    while open_sessions := [session for session in sessions if len(session.new) < NEW_TOKENS]:
        steps: list[tuple[list[CacheLease], int, list[int]]] = []
        for session in open_sessions:
            part, session.waiting = (
                session.waiting[: session.chunk_tokens],
                session.waiting[session.chunk_tokens :],
            )
            steps.append((session.leases, session.position, part))
            session.position += len(part)
        for session, logits in zip(open_sessions, chain.run(steps), strict=True):
            if not session.waiting:
                session.waiting = [int(logits[-1].argmax())]
                session.new += session.waiting
    return [session.new for session in sessions]


@pytest.mark.slow
@pytest.mark.parametrize(
    "boundaries",
    [
        (0, 2, 3, 4),
        *(pytest.param(split, marks=pytest.mark.sweep) for split in ((0, 4), (0, 1, 4), (0, 1, 2, 3, 4))),
    ],
    ids=str,
)
def test_greedy_ids_equal_transformers_for_every_family_and_split(
    family_checkpoint: Checkpoint, oracle: Oracle, boundaries: tuple[int, ...]
) -> None:
    """Sessions of all lengths together, prompts in chunks of all sizes, prefill and decode mixed."""
    prompts = [prompt(tokens) for tokens in PROMPT_TOKENS]
    model = oracle(family_checkpoint.folder)
    expected = [continuation(model, ids, NEW_TOKENS) for ids in prompts]
    assert decode_together(Chain(family_checkpoint, boundaries), prompts, CHUNK_TOKENS) == expected


def test_logits_are_those_of_transformers(family_checkpoint: Checkpoint, oracle: Oracle) -> None:
    chain = Chain(family_checkpoint, (0, 3, 4))
    ids = prompt(150)
    (logits,) = chain.run([(chain.reserve(150), 0, ids)])
    torch.testing.assert_close(logits, logits_of(oracle(family_checkpoint.folder), ids), atol=2e-4, rtol=1e-4)


def test_a_session_rolled_back_goes_on_as_if_nothing_had_been(
    family_checkpoint: Checkpoint, oracle: Oracle
) -> None:
    chain = Chain(family_checkpoint, (0, 2, 4))
    leases = chain.reserve(100)
    ids, instead = prompt(70), prompt(40)
    chain.run([(leases, 0, ids)])
    (logits,) = chain.run([(leases, 33, instead)])
    assert [lease.length for lease in leases] == [73, 73]
    expected = logits_of(oracle(family_checkpoint.folder), ids[:33] + instead)[33:]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_pages_here_and_there_give_what_pages_in_a_row_give(family_checkpoint: Checkpoint) -> None:
    chain = Chain(family_checkpoint, (0, 4))
    ids = prompt(5 * PAGE)
    whole = chain.reserve(6 * PAGE)
    scattered = _scattered_lease(chain.runners[0], 6 * PAGE)
    assert whole[0].start is not None
    assert scattered.start is None
    in_place = chain.run([(whole, 0, ids[:60])])[0], chain.run([(whole, 60, ids[60:])])[0]
    gathered = chain.run([([scattered], 0, ids[:60])])[0], chain.run([([scattered], 60, ids[60:])])[0]
    torch.testing.assert_close(gathered, in_place)
    torch.testing.assert_close(chain.run([([scattered], 80, [7])]), chain.run([(whole, 80, [7])]))


def test_chunks_of_one_session_may_share_a_batch(family_checkpoint: Checkpoint) -> None:
    chain = Chain(family_checkpoint, (0, 4))
    ids = prompt(90)
    (expected,) = chain.run([(chain.reserve(90), 0, ids)])
    leases = chain.reserve(90)
    parts = chain.run([(leases, 0, ids[:20]), (chain.reserve(9), 0, ids[:9]), (leases, 20, ids[20:])])
    torch.testing.assert_close(torch.cat((parts[0], parts[2])), expected, atol=1e-4, rtol=1e-4)
    assert leases[0].length == 90


def test_a_session_may_use_a_part_of_the_span(family_checkpoint: Checkpoint) -> None:
    whole, part = Chain(family_checkpoint, (0, 4)), Chain(family_checkpoint, (1, 3))
    hidden = whole.ends.embed(prompt(30))
    outputs: list[Tensor] = []
    for chain, span in ((whole, BlockSpan(1, 3)), (part, None)):
        (lease,) = chain.reserve(30)
        parts = [
            chain.runners[0].run([Chunk(lease, start, hidden[start:stop])], span)[0]
            for start, stop in ((0, 20), (20, 29), (29, 30))
        ]
        outputs.append(torch.cat(parts))
    torch.testing.assert_close(*outputs)


def test_a_failed_batch_leaves_its_sessions_no_longer_than_they_were(
    family_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(family_checkpoint, (0, 4))
    ids = prompt(30)
    kept, rolled_back = chain.reserve(60), chain.reserve(60)
    chain.run([(kept, 0, ids), (rolled_back, 0, ids)])
    with monkeypatch.context() as patch:
        patch.setattr(chain.runners[0].cache.pools[0], "write", _out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            chain.run([(kept, 30, [5, 6]), (rolled_back, 10, [5, 6])])
    assert (kept[0].length, rolled_back[0].length) == (30, 10)
    (again,) = chain.run([(kept, 30, [5, 6])])
    (expected,) = chain.run([(chain.reserve(60), 0, [*ids, 5, 6])])
    torch.testing.assert_close(again, expected[30:], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def runner(tiny_stories: Path) -> SpanRunner:
    checkpoint = open_checkpoint(tiny_stories, "tiny-stories")
    return open_runner(
        checkpoint,
        BlockSpan(2, 4),
        ComputeConfig(device="cpu", dtype="float32", cache_bytes=1 << 20, threads=1),
    )


def test_no_chunks_are_no_work(runner: SpanRunner) -> None:
    assert runner.run([]) == []


def test_what_cannot_be_run_is_refused_and_changes_nothing(runner: SpanRunner) -> None:
    hidden = torch.zeros(4, 320)
    lease, other = runner.cache.reserve(10), runner.cache.reserve(10)
    runner.run([Chunk(lease, 0, hidden)])
    refused = {
        "cannot go on at 5": [Chunk(lease, 5, hidden)],
        "cannot go on at -1": [Chunk(lease, -1, hidden)],
        "11 tokens exceed the 10": [Chunk(other, 0, hidden), Chunk(lease, 4, torch.zeros(7, 320))],
        r"of shape \(0, 320\)": [Chunk(lease, 4, hidden[:0])],
        r"of shape \(4, 319\)": [Chunk(lease, 4, hidden[:, :-1])],
        "meet at 3 and 6": [Chunk(lease, 2, hidden), Chunk(lease, 3, hidden)],
    }
    for message, chunks in refused.items():
        with pytest.raises(ValueError, match=message):
            runner.run(chunks)
        assert (lease.length, other.length) == (4, 0)
    lease.release()
    with pytest.raises(ValueError, match="1 tokens exceed the 0"):
        runner.run([Chunk(lease, 0, hidden[:1])])
    other.release()


def test_any_float_dtype_goes_in_and_the_runners_own_comes_out(runner: SpanRunner) -> None:
    lease = runner.cache.reserve(8)
    hidden = torch.randn(2, 320, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    (narrow,) = runner.run([Chunk(lease, 0, hidden)])
    (wide,) = runner.run([Chunk(lease, 0, hidden.double())])
    assert narrow.dtype == wide.dtype == runner.dtype == torch.float32
    assert str(runner.numerics) == "float32"
    torch.testing.assert_close(narrow, wide)
    lease.release()


def test_a_worker_thread_computes_with_as_many_threads_as_torch_was_given(
    runner: SpanRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP counts by thread; a new one starts with every core, whatever torch says, or as here with two."""
    libraries = re.findall(r"/\S*libg?omp\S*", Path("/proc/self/maps").read_text())
    if not libraries:
        pytest.skip("torch computes without OpenMP here")
    openmp = ctypes.CDLL(libraries[0])
    count_threads: Callable[[], int] = openmp.omp_get_max_threads
    take_threads: Callable[[int], None] = openmp.omp_set_num_threads
    counts: list[int] = []

    def count(*_: object) -> None:
        counts.append(count_threads())
        _out_of_memory()

    monkeypatch.setattr("p2pinfer.models.compute.stage.PackedAttention", count)
    lease = runner.cache.reserve(1)
    with ThreadPoolExecutor(1, initializer=take_threads, initargs=(2,)) as pool, pytest.raises(RuntimeError):
        pool.submit(runner.run, [Chunk(lease, 0, torch.zeros(1, 320))]).result()
    assert counts == [1]
    lease.release()


def test_a_span_beyond_the_model_is_refused(tiny_stories: Path) -> None:
    with pytest.raises(SpanOutOfRange, match="7:9 is out of range"):
        open_runner(open_checkpoint(tiny_stories, "tiny-stories"), BlockSpan(7, 9), FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "boundaries"), [("tiny_stories", (0, 1, 4, 8)), ("smollm2", (0, 7, 30))])
def test_trained_weights_give_the_ids_of_transformers(
    model: str, boundaries: tuple[int, ...], request: pytest.FixtureRequest, oracle: Oracle
) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(model), model)
    prompts = [prompt(tokens, checkpoint.spec.vocab_size) for tokens in (1, 70, 200)]
    expected = [continuation(oracle(checkpoint.folder), ids, NEW_TOKENS) for ids in prompts]
    chain = Chain(checkpoint, boundaries, ComputeConfig(dtype="float32", cache_bytes=1 << 26))
    assert decode_together(chain, prompts, (1, 64, 128)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "boundaries"),
    [("tiny_stories", (0, 3, 8)), pytest.param("smollm2", (0, 30), marks=pytest.mark.sweep)],
)
def test_bfloat16_ids_equal_transformers_wherever_the_margin_is_clear(
    model: str, boundaries: tuple[int, ...], request: pytest.FixtureRequest, oracle: Oracle
) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(model), model)
    reference = oracle(checkpoint.folder)
    start = prompt(20, checkpoint.spec.vocab_size)
    ids = start + continuation(reference, start, 60)
    clear = clear_choices(
        logits_of(reference, ids), logits_of(oracle(checkpoint.folder, torch.bfloat16), ids)
    )
    chain = Chain(checkpoint, boundaries, ComputeConfig(dtype="bfloat16", cache_bytes=1 << 26))
    leases = chain.reserve(len(ids))
    logits = [chain.run([(leases, 0, ids[:40])])[0]]
    logits += [chain.run([(leases, position, [ids[position]])])[0] for position in range(40, len(ids))]
    assert clear.mask.sum() > len(ids) / 4
    assert torch.equal(torch.cat(logits).argmax(-1)[clear.mask], clear.ids[clear.mask])


def _scattered_lease(runner: SpanRunner, max_tokens: int) -> CacheLease:
    """A lease of pages that do not lie in a row, the cache otherwise as it was."""
    cache = runner.cache
    leases = [cache.reserve(PAGE) for _ in range(cache.free_tokens // PAGE)]
    for lease in leases[::2]:
        lease.release()
    scattered = cache.reserve(max_tokens)
    for lease in leases[1::2]:
        lease.release()
    return scattered


def _out_of_memory(*_: object) -> None:
    raise RuntimeError("out of memory")
