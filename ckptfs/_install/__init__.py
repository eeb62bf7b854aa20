"""The steps of ``ckptfs install-node``, which installs ckptfs on a node with systemd.

``node`` has the order of the steps. ``program`` makes the virtual environment. ``record`` keeps a
list of the files, with which ``--uninstall`` removes them.
"""

from ckptfs.errors import CkptfsError


class InstallError(CkptfsError):
    """The installation failed."""
