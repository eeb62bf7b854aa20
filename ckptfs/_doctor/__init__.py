"""The checks of ``ckptfs doctor``: what can be wrong with a machine, its daemon and a store.

`checks` says what a check is and runs them, `node` is about the machine and what is configured,
`disk` about the cache's disk, `serving` about daemons and their mounts, `store` about a URI, and
`plan` has them all, in their order.
"""
