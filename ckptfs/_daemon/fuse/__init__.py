"""The FUSE adapter: requests of the kernel become calls of `fs`, and errors become errnos."""
