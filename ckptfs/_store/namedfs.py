"""Alias of `lazy_filesystem` for one release: pickles of the previous release name the class
here."""

from ckptfs._store.lazy_filesystem import StoreHandler

__all__ = ["StoreHandler"]
