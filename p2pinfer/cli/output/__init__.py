"""Text, tables, progress lines and logs, as the terminal gets them."""
