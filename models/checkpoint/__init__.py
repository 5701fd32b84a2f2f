"""Checkpoints: config, hashes, the hub, and reading tensors."""
