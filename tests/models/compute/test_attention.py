"""Attention against the plainest way to compute it, one query after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pinfer.models.compute.architecture import Architecture, describe_architecture
from p2pinfer.models.compute.attention import PackedAttention, Piece
from p2pinfer.models.compute.cache import CacheLease, PagedCache
from p2pinfer.models.configs.defaults import complete_config

from ..bounds import bound_of_attention

ROW = 400  # more tokens than any sequence here
PAGE = 8


def architecture(heads: int, kv_heads: int, softcap: float | None) -> Architecture:
    sizes = {"hidden_size": 16 * heads, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config = complete_config("m", {"model_type": "llama", "num_hidden_layers": 2, **sizes})
    return replace(describe_architecture(config), attention_softcap=softcap, attention_scale=0.3)


def attend_plainly(
    shape: Architecture, queries: Tensor, keys_values: Tensor, position: int, window: int | None
) -> Tensor:
    """(tokens, heads, head_dim) against (length, 2 * kv_heads, head_dim), by the definition."""
    repeated = keys_values.double().repeat_interleave(shape.heads // shape.kv_heads, 1)
    keys, values = repeated[:, : shape.heads], repeated[:, shape.heads :]
    outputs: list[Tensor] = []
    for stop, query in enumerate(queries.double(), position + 1):
        start = 0 if window is None else max(0, stop - window)
        scores = torch.einsum("hd,lhd->hl", query, keys[start:stop]) * shape.attention_scale
        if shape.attention_softcap is not None:
            scores = (scores / shape.attention_softcap).tanh() * shape.attention_softcap
        outputs.append(torch.einsum("hl,lhd->hd", scores.softmax(1), values[start:stop]).flatten())
    return torch.stack(outputs)


class Session:
    """A sequence in a cache, its keys and values known from outside."""

    def __init__(self, lease: CacheLease, shape: Architecture, seed: int) -> None:
        self.lease = lease
        self.random = torch.Generator().manual_seed(seed)
        self.shape = shape
        self.keys_values = torch.randn(ROW, 2 * shape.kv_heads, 16, generator=self.random)

    def queries(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self.shape.heads, 16, generator=self.random)


@settings(max_examples=50, deadline=None)
@given(
    heads=st.sampled_from([(4, 2), (3, 3), (4, 1)]),
    softcap=st.sampled_from([None, None, 2.0]),
    windows=st.tuples(st.sampled_from([None, 1, 5, 40]), st.sampled_from([None, 13])),
    pieces=st.lists(
        st.tuples(
            st.sampled_from([0, 0, 1, 7, 40, 130]), st.sampled_from([1, 1, 2, 9, 33, 140]), st.booleans()
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_every_mix_of_pieces_attends_as_the_definition_says(
    heads: tuple[int, int],
    softcap: float | None,
    windows: tuple[int | None, int | None],
    pieces: list[tuple[int, int, bool]],
) -> None:
    """Any positions, lengths, windows, groups and soft caps, pages in a row or not."""
    shape = architecture(*heads, softcap)
    cache = make_cache(shape, 2)
    everywhere = torch.arange(cache.capacity_tokens)
    nowhere_to_be_seen = torch.full((len(everywhere), 2 * shape.kv_heads, 16), torch.nan)
    for block in range(2):
        cache.pools[0].write(block, everywhere, nowhere_to_be_seen)
    sessions: list[Session] = []
    batch: list[Piece] = []
    for seed, (position, tokens, scattered) in enumerate(pieces):
        session = Session(strewn(cache, ROW) if scattered else cache.reserve(ROW), shape, seed)
        slots = torch.tensor(session.lease.slots(0, position), dtype=torch.long)
        for block in range(2):
            cache.pools[0].write(block, slots, session.keys_values[:position])
        sessions.append(session)
        batch.append(Piece(session.lease, position, tokens))
    attention = PackedAttention(shape, windows, cache.pools[0], batch)
    expected_positions = [torch.arange(piece.position, piece.position + piece.tokens) for piece in batch]
    assert torch.equal(attention.positions, torch.cat(expected_positions))
    for block, window in enumerate(windows):
        queries = [session.queries(piece.tokens) for session, piece in zip(sessions, batch, strict=True)]
        fresh = [
            session.keys_values[piece.position : piece.position + piece.tokens]
            for session, piece in zip(sessions, batch, strict=True)
        ]
        plain = [
            attend_plainly(shape, query, session.keys_values, piece.position, window)
            for query, session, piece in zip(queries, sessions, batch, strict=True)
        ]
        output = attention.attend(block, torch.cat(queries), torch.cat(fresh))
        torch.testing.assert_close(output, torch.cat(plain).float(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_long_prompt_under_a_soft_cap_is_cut_in_rows(dtype: torch.dtype) -> None:
    shape = architecture(4, 1, 3.0)
    cache = make_cache(shape, 1, dtype)
    session = Session(cache.reserve(ROW), shape, 0)
    queries, keys_values = session.queries(150).to(dtype), session.keys_values[:150].to(dtype)
    attention = PackedAttention(shape, [None], cache.pools[0], [Piece(session.lease, 0, 150)])
    output = attention.attend(0, queries, keys_values)
    expected = attend_plainly(shape, queries, keys_values, 0, None)
    assert (output.double() - expected).abs().max() <= bound_of_attention(keys_values[:, 1:])


def test_a_single_row_in_bfloat16_attends_as_the_definition_says() -> None:
    """Without groups there is one row to a key head, which is doubled for speed."""
    shape = architecture(3, 3, None)
    cache = make_cache(shape, 1, torch.bfloat16)
    session = Session(cache.reserve(ROW), shape, 0)
    keys_values = session.keys_values[:60].bfloat16()
    cache.pools[0].write(0, torch.tensor(session.lease.slots(0, 59)), keys_values[:59])
    queries = session.queries(1).bfloat16()
    output = PackedAttention(shape, [None], cache.pools[0], [Piece(session.lease, 59, 1)]).attend(
        0, queries, keys_values[59:]
    )
    expected = attend_plainly(shape, queries, keys_values, 59, None)
    assert (output.double() - expected).abs().max() <= bound_of_attention(keys_values[:, 3:])


def make_cache(shape: Architecture, num_blocks: int, dtype: torch.dtype = torch.float32) -> PagedCache:
    return PagedCache(
        layout=[(torch.device("cpu"), num_blocks)],
        kv_heads=shape.kv_heads,
        head_dim=16,
        dtype=dtype,
        budget_bytes=1 << 22,
        page_tokens=PAGE,
    )


def strewn(cache: PagedCache, max_tokens: int) -> CacheLease:
    """A lease of pages that are not neighbours."""
    pages = -(-max_tokens // PAGE)
    single = [cache.reserve(PAGE) for _ in range(2 * pages)]
    rest = cache.reserve(cache.free_tokens)
    for lease in single[::2]:
        lease.release()
    lease = cache.reserve(max_tokens)
    assert lease.start is None
    for other in [*single[1::2], rest]:
        other.release()
    return lease
