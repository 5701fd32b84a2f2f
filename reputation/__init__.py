"""Whom to believe: what was seen of each peer, as two scores. Knows no sockets and no clock."""
