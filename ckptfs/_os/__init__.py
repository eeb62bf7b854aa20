"""Helpers on the operating system: locks, scratch directories, mounts, peers and terminals."""
