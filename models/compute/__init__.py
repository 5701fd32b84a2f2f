"""The forward pass: blocks, attention, KV cache, embedding and LM head."""
