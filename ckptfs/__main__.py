"""Entry point of the ``ckptfs`` command."""

import sys

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
