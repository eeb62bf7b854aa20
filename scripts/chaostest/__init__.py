"""The run of `scripts/chaos`: a mount, readers that know every byte, and faults."""
