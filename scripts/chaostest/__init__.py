"""What `scripts/chaos` runs: a mount, readers that know every byte, and all that goes wrong."""
