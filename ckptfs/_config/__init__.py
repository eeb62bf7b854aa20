"""The effective configuration, and the paths that ckptfs chooses if none is configured."""
