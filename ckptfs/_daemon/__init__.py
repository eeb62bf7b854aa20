"""The daemon: everything that runs in the keeper and in the mount's own process."""
