"""Weights that travel between peers."""
