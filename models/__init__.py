"""What is computed: checkpoints, decoder blocks, KV cache, sampling. Knows no peers."""
