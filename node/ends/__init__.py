"""Embedding and head of a node, for clients that hold none."""
