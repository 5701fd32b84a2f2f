"""Routing: who serves what, and the cheapest chain through them. Knows no sockets and no clock."""
