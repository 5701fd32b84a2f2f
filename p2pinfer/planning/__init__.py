"""Routes for a client: the policy's choice, timings, cooldowns, the ledger."""
