"""Text from sessions: drawing tokens, waiting out an outage, resuming."""
