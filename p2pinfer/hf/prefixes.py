"""Prefixes: keys and values that prefix tuning puts before those of every row, in a cache of transformers."""

from __future__ import annotations

from typing import Any

import torch

from p2pinfer.errors import LocalError

from .remote_layers import Prefix


def prefix_of(past: Any, num_blocks: int) -> Prefix:
    """Keys and values in a cache, each block's (kv_heads, tokens, head_dim); none if there is nothing in it.

    They belong to the graph of the cache's, so gradients reach the parameters that they were made of. peft
    repeats them for every row, and one row's travels.

    Raises:
        LocalError: They differ from row to row, as those of a text do, or from block to block in number.
    """
    if past is None:
        return ()
    if not hasattr(past, "get_seq_length") or not hasattr(past, "layers"):
        raise LocalError(
            f"past_key_values is a {type(past).__name__}; on the swarm it is a transformers.Cache with the "
            "prefix of prefix tuning, or none"
        )
    tokens = int(past.get_seq_length())
    if not tokens:
        return ()
    pairs = [(each.keys, each.values) for each in past.layers]
    if len(pairs) != num_blocks or any(each.shape[2] != tokens for pair in pairs for each in pair):
        raise LocalError(
            f"a prefix of {len(pairs)} blocks and {tokens} tokens; it needs all {num_blocks} blocks, and as "
            "many tokens in each: give fewer virtual tokens than the attention window has"
        )
    if not all(torch.equal(each, each[:1].expand_as(each)) for pair in pairs for each in pair):
        raise LocalError(
            "keys and values that differ from row to row do not travel to the swarm; give the whole text, or "
            "let model.generate make its cache"
        )
    return [(keys[0], values[0]) for keys, values in pairs]
