"""Weights in 8 and 4 bits: their formats, and the products that read them as they are held."""
