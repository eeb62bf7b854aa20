"""Alias of `lazy_filesystem` for one release: pickles of the previous release name the class
here."""

from ckptfs._store.lazy_filesystem import UriHandler

__all__ = ["UriHandler"]
