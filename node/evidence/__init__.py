"""Evidence of finished work: its store, its exchange and its check."""
