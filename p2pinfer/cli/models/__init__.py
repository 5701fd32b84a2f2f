"""`p2pinfer models`, and what it knows of models on the disk."""
