"""Counters and traces of what processes read, and what the daemon fetched for them."""
