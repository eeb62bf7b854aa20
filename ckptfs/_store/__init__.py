"""Stores: blocking access to the objects of a checkpoint. The only importer of pyarrow."""
