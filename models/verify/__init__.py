"""Comparison of a span's output with a recomputation."""
