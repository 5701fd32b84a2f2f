"""Training passes of a span: forward without a cache, backward, adapters applied to frozen blocks."""
