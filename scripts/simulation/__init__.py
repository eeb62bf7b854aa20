"""What a restore would take on many nodes, from a model that is checked against real runs.

`flow` shares bandwidth, `ways` says what each way of restoring does, `calibration` has the real
runs; see `scripts/simulate --help`.
"""
