"""Every error that can reach the FUSE adapter has its errno, in one table."""

import errno

from ckptfs import errors
from ckptfs._daemon import vfs, xattrs
from ckptfs._daemon.fuse import ERRNOS


def _tree(root: type[Exception], module: str) -> "set[type[Exception]]":
    found = {leaf for child in root.__subclasses__() for leaf in _tree(child, module)}
    return found | ({root} if root.__module__ == module else set())


def test_the_table_is_complete_and_has_nothing_else() -> None:
    expected = _tree(errors.CkptfsError, "ckptfs.errors")
    expected |= _tree(vfs.VfsError, "ckptfs._daemon.vfs") - {vfs.VfsError}
    expected |= _tree(vfs.VfsError, "ckptfs._daemon.xattrs")
    assert set(ERRNOS) == expected


def test_the_promised_errnos() -> None:
    assert ERRNOS[errors.ObjectChanged] == errno.ESTALE
    assert ERRNOS[errors.StoreTimeout] == errno.ETIMEDOUT
    assert ERRNOS[errors.StoreUnavailable] == errno.EIO
    assert ERRNOS[vfs.NoEntry] == errno.ENOENT
    assert ERRNOS[xattrs.NoAttribute] == errno.ENODATA
    assert ERRNOS[xattrs.AttributeStated] == errno.EROFS
    assert ERRNOS[xattrs.NotSupported] == errno.ENOTSUP
    assert ERRNOS[xattrs.InvalidValue] == errno.EINVAL
    assert ERRNOS[xattrs.NotPermitted] == errno.EPERM
    assert ERRNOS[errors.AccessDenied] == errno.EACCES
    assert ERRNOS[errors.Busy] == errno.EBUSY
    assert ERRNOS[vfs.StaleInode] == errno.ESTALE
    assert ERRNOS[errors.NotAttached] == errno.ESTALE
