"""This computer: the memory and the cores that this process may use."""
