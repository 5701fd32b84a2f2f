"""Training for clients: passes of microbatches through this node's blocks."""
