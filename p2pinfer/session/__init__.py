"""One session on the hops of a route: steps, failover, handover, receipts."""
