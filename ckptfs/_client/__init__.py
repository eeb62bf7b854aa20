"""The client: it finds the daemon or starts one, and asks it to attach checkpoints."""
