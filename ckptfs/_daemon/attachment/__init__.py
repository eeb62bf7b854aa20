"""An attached checkpoint: its snapshot, inodes, metadata, journal and prefetches."""
