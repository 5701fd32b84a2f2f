"""Files of a model by content address: what it consists of, and the chunks in which they travel."""
