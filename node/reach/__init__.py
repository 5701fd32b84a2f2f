"""Connections across routers: reachability, port mapping, hole punching, relays."""
