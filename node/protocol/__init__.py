"""Messages of a session, their frames and tensors, and the link between two hops."""
