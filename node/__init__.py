"""Networking and serving: identity, host, gossip, protocol, server, worker."""
