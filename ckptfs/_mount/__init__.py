"""The mount, as keeper and daemon share it: the FUSE session, the handoff and the logs."""
