"""Fixtures of all tests of the fetcher."""

from support.fetching import offload, store

__all__ = ["offload", "store"]
