"""Reputation of peers: observations turned into two scores. Knows no sockets and no clock."""
