"""Membership: discovery, gossip, anti-entropy and the live table of peers."""
