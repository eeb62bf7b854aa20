"""Uploads in the background: their files and records on the disk, and the processes that send."""
