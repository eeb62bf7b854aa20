"""The keeper: the process that owns the mount and the control socket, and runs the daemon."""
