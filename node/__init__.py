"""How peers talk: identity, host, gossip, wire, server, worker."""
