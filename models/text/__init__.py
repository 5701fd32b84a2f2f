"""Text and tokens: tokenizers, incremental decoding, sampling."""
