"""Every error that can reach the FUSE adapter has its errno, in one table."""

import errno

from ckptfs import errors
from ckptfs._daemon.attachment import inodes
from ckptfs._daemon.fs import xattrs
from ckptfs._daemon.fuse.operations import errno_of


def _tree(root: type[Exception], module: str) -> "set[type[Exception]]":
    found = {leaf for child in root.__subclasses__() for leaf in _tree(child, module)}
    return found | ({root} if root.__module__ == module else set())


def test_each_error_has_the_documented_errno() -> None:
    known = _tree(errors.CkptfsError, "ckptfs.errors")
    known |= _tree(inodes.VfsError, "ckptfs._daemon.attachment.inodes") - {inodes.VfsError}
    known |= _tree(inodes.VfsError, "ckptfs._daemon.fs.xattrs")
    found = {error: errno_of(error("x")) for error in known}
    assert {error: code for error, code in found.items() if code != errno.EIO} == {
        errors.ObjectChanged: errno.ESTALE,
        errors.StoreTimeout: errno.ETIMEDOUT,
        errors.AccessDenied: errno.EACCES,
        errors.RightsNotLent: errno.EACCES,
        errors.StoreNotAllowed: errno.EACCES,
        errors.NotAttached: errno.ESTALE,
        errors.Busy: errno.EBUSY,
        errors.LimitExceeded: errno.ENFILE,
        inodes.NoEntry: errno.ENOENT,
        inodes.NotDirectory: errno.ENOTDIR,
        inodes.IsDirectory: errno.EISDIR,
        inodes.ReadOnly: errno.EROFS,
        inodes.StaleInode: errno.ESTALE,
        xattrs.NoAttribute: errno.ENODATA,
        xattrs.AttributeStated: errno.EROFS,
        xattrs.NotSupported: errno.ENOTSUP,
        xattrs.InvalidValue: errno.EINVAL,
        xattrs.NotPermitted: errno.EPERM,
    }
