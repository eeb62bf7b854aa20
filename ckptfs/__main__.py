"""Entry point of the ``ckptfs`` command."""

import os
import sys

try:
    os.getcwd()
except OSError:  # the shell stands in a mount that is gone; libraries ask for it on import
    os.chdir("/")

from ckptfs.cli import app
from ckptfs.errors import CkptfsError


def main() -> None:
    """Run the command line; a user's mistake ends in one line on standard error and status 1."""
    try:
        app()
    except (CkptfsError, OSError) as error:
        print(f"ckptfs: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
