"""Computation: checkpoints, decoder blocks, KV cache, sampling. Knows no peers."""
