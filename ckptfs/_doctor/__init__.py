"""The checks of ``ckptfs doctor``, which find faults of a machine, its daemon and a store.

`checks` defines and runs checks. `node` checks the machine and its configuration, `disk` the disk
of the cache, `serving` the daemons and their mounts, and `store` the store of a URI. `plan` lists
all checks in their order.
"""
