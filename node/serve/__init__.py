"""The serving side: admission, sessions, batching, receipts, announcements."""
