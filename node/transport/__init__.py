"""Bytes between hosts: addresses, TCP, private networks, Noise, yamux, circuits."""
