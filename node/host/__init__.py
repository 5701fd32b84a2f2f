"""The libp2p host: connections to peers and the streams on them."""
