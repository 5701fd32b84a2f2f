"""Training over a swarm: microbatches through the hops of a route, and their gradients back."""
