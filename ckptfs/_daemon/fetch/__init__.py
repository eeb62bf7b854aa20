"""Fetching: from a read of absent blocks to verified bytes in the cache."""
