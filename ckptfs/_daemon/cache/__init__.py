"""The cache of blocks on the node's disk."""
