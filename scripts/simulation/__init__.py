"""A model of the time of a restore on many nodes, with a check against real runs.

`flow` shares bandwidth, `ways` has the stages of each way of restoring, and `calibration` has the
real runs. See `scripts/simulate --help`.
"""
