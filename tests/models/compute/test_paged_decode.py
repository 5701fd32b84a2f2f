from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute import paged_decode
from p2pinfer.models.compute.attention import Piece
from p2pinfer.models.compute.blocks import Blocks, load_blocks
from p2pinfer.models.compute.cache import CacheLease, PagedCache
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead, load_embedding_and_head
from p2pinfer.models.compute.paged_decode import PagedDecoder
from p2pinfer.models.compute.runner import Chunk, SpanRunner
from p2pinfer.models.compute.stage import Stage
from p2pinfer.models.compute.target import Target
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.numerics import FLOAT32
from p2pinfer.models.span import BlockSpan

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
PROMPTS = (1, 15, 16, 70, 250)


class Model:
    """A whole tiny model, whose decode steps are the ones that a GPU would record."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        target = Target(torch.device("cpu"), FLOAT32)
        self.blocks: Blocks = load_blocks(checkpoint, BlockSpan(0, 4), target)
        shape = self.blocks.architecture
        self.cache = PagedCache(
            layout=[(target.device, 4)],
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=torch.float32,
            budget_bytes=1 << 23,
            page_tokens=16,
        )
        everywhere = torch.arange(self.cache.capacity_tokens)
        for block in range(4):  # what is never written must never be read, not even to be weighted by zero
            self.cache.pools[0].write(
                block,
                everywhere,
                torch.full((len(everywhere), 2 * shape.kv_heads, shape.head_dim), torch.nan),
            )
        self.decoder = PagedDecoder(self.blocks, self.cache.pools[0])
        self.plain = SpanRunner([Stage(self.blocks, self.cache.pools[0])], self.cache)
        self.static = SpanRunner([Stage(self.blocks, self.cache.pools[0], self.decoder)], self.cache)
        self.ends: EmbeddingAndHead = load_embedding_and_head(checkpoint, ComputeConfig(dtype="float32"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_attention_in_parts_is_attention(parts: int, dtype: torch.dtype, device: str) -> None:
    """Also where a part is hidden as a whole, and of sequences that lie in any order."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, group, context, size = 3, 2, 4, 256, 64
    rows = torch.randn(batch, heads, group, size, generator=generator)
    both = torch.randn(2, heads, batch, context, size, generator=generator).transpose(1, 2)
    seen = torch.arange(context) < torch.tensor([1, 130, context])[:, None]
    mask = torch.zeros(batch, 1, 1, context).masked_fill_(~seen[:, None, None], -torch.inf)
    expected = ((rows @ both[0].transpose(2, 3)) * 0.25 + mask).softmax(-1) @ both[1]
    finite = mask.to(dtype).clamp(min=torch.finfo(dtype).min / 2).expand(-1, -1, group, -1)
    given = [each.to(device, dtype) for each in (rows, both[0], both[1], finite)]
    found = paged_decode.attend_in_parts(given[0], given[1], given[2], given[3], 0.25, parts)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.float().cpu(), expected, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=1e-2
    )


def test_few_long_sequences_are_cut_in_parts_and_many_or_short_ones_are_not() -> None:
    parts = paged_decode._parts  # pyright: ignore[reportPrivateUsage]
    assert [parts(8, context) for context in (256, 1024, 2048, 4096, 1 << 17)] == [1, 1, 8, 16, 32]
    assert [parts(8 * batch, 4096) for batch in (1, 2, 4, 8, 16, 32)] == [16, 16, 8, 1, 1, 1]


@pytest.fixture
def model(
    request: pytest.FixtureRequest, family_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> Model:
    """Experts cannot be recorded, but they can be computed the same way."""
    monkeypatch.setattr(paged_decode, "_MIN_CONTEXT", 32)
    if getattr(request, "param", "") == "in parts":
        monkeypatch.setattr(paged_decode, "_LONG_CONTEXT", 64)
        monkeypatch.setattr(paged_decode, "_MIN_PART", 16)
    return Model(family_checkpoint)


@pytest.mark.parametrize("fault", ["sums", "missing"])
def test_a_device_whose_parts_make_no_whole_attends_to_the_whole(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    attend = paged_decode._attend_with_sums  # pyright: ignore[reportPrivateUsage]

    def faulty(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if fault == "missing":
            raise AttributeError("'_OpNamespace' 'aten' object has no attribute")
        output, sums = attend(*given)
        return output, torch.zeros_like(sums)

    assert PagedDecoder(model.blocks, model.cache.pools[0]).attends_in_parts
    assert not caplog.records
    monkeypatch.setattr(paged_decode, "_attend_with_sums", faulty)
    decoder = PagedDecoder(model.blocks, model.cache.pools[0])
    assert not decoder.attends_in_parts
    assert "attention in parts is wrong on cpu" in caplog.text
    runner = SpanRunner([Stage(model.blocks, model.cache.pools[0], decoder)], model.cache)
    lease, row = model.cache.reserve(300), model.ends.embed([9])
    model.plain.run([Chunk(lease, 0, model.ends.embed([7] * 270))])
    (static,) = runner.run([Chunk(lease, 270, row)])
    (plain,) = model.plain.run([Chunk(lease, 270, row)])
    torch.testing.assert_close(static, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["whole", "in parts"], indirect=True)
def test_steps_through_static_buffers_give_the_tokens_of_transformers(
    model: Model, family_checkpoint: Checkpoint, oracle: Callable[..., PreTrainedModel]
) -> None:
    """Sessions of all lengths, that come and go, over sizes of batch and context."""
    reference: Any = oracle(family_checkpoint.folder)
    prompts = [[3 + (7 * index) % 190 for index in range(tokens)] for tokens in PROMPTS]
    leases = [model.cache.reserve(len(prompt) + 20) for prompt in prompts]
    ids: list[list[int]] = []
    for prompt, lease in zip(prompts, leases, strict=True):
        (hidden,) = model.plain.run([Chunk(lease, 0, model.ends.embed(prompt))])
        ids.append([*prompt, int(model.ends.logits(hidden[-1:]).argmax())])
    for taking_part in ([0, 1, 2, 3, 4], [4], [1, 3], [3, 1], [0, 2, 4], [2]) * 2:
        chunks = [
            Chunk(leases[index], leases[index].length, model.ends.embed(ids[index][-1:]))
            for index in taking_part
        ]
        outputs = model.static.run(chunks)
        for index, output in zip(taking_part, outputs, strict=True):
            ids[index].append(int(model.ends.logits(output).argmax()))
    for prompt, grown in zip(prompts, ids, strict=True):
        batch = torch.tensor([prompt])
        expected = reference.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=len(grown) - len(prompt),
            do_sample=False,
            eos_token_id=None,
        )
        assert grown == expected[0].tolist()


def test_a_step_equals_the_packed_one_also_on_part_of_the_span_and_after_rolling_back(model: Model) -> None:
    prompt = model.ends.embed(list(range(3, 60)))
    row = model.ends.embed([9])
    leases = [_strewn(model.cache, 80), model.cache.reserve(80), model.cache.reserve(80)]
    for lease in leases:
        model.plain.run([Chunk(lease, 0, prompt)])
    for span in (None, BlockSpan(1, 3)):
        for positions in ((57, 57, 57), (30, 57, 2)):
            chunks = [Chunk(lease, position, row) for lease, position in zip(leases, positions, strict=True)]
            static = model.static.run(chunks, span)
            torch.testing.assert_close(static, model.plain.run(chunks, span), atol=1e-4, rtol=1e-4)
        for lease in leases:
            model.plain.run([Chunk(lease, 0, prompt)])


def test_pages_that_changed_hands_between_two_steps_are_not_touched(model: Model) -> None:
    """A session that lent the rest of its pages gets others for it later."""
    row, prompt = model.ends.embed([9]), model.ends.embed(list(range(3, 43)))
    room, lease = model.cache.reserve(64), model.cache.reserve(64)
    model.static.run([Chunk(lease, 0, prompt)])
    model.static.run([Chunk(lease, 40, row)])
    lease.resize(48)
    other = model.cache.reserve(model.cache.free_tokens)
    model.static.run([Chunk(other, 0, prompt)])
    (before,) = model.plain.run([Chunk(other, 40, row)])
    room.release()
    lease.resize(64)
    for position in range(41, 60):
        (static,) = model.static.run([Chunk(lease, position, row)])
        (plain,) = model.plain.run([Chunk(lease, position, row)])
        torch.testing.assert_close(static, plain, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.plain.run([Chunk(other, 40, row)])[0], before)


def test_only_steps_of_one_token_each_of_a_few_sessions_are_taken(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = [model.cache.reserve(4) for _ in range(3)]
    one = [Piece(lease, 3, 1) for lease in leases]
    experts = model.blocks.architecture.family.experts is not None
    assert model.decoder.accepts(one) != experts
    assert not model.decoder.accepts([*one[:2], Piece(leases[2], 2, 2)])
    assert not model.decoder.accepts([one[0], Piece(leases[0], 4, 1)])
    with monkeypatch.context() as patch:
        patch.setattr(paged_decode, "_MAX_BATCH", 2)
        assert not model.decoder.accepts(one)
    with monkeypatch.context() as patch:
        patch.setattr(paged_decode, "_MAX_GATHERED_BYTES", 100)
        assert not model.decoder.accepts(one)


def _strewn(cache: PagedCache, max_tokens: int) -> CacheLease:
    """A lease of pages that are not neighbours."""
    leases = [cache.reserve(1) for _ in range(20)]
    rest = cache.reserve(cache.free_tokens)
    for lease in leases[::2]:
        lease.release()
    lease = cache.reserve(max_tokens)
    assert lease.start is None
    for other in [*leases[1::2], rest]:
        other.release()
    return lease
