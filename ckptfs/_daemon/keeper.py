"""Alias of `ckptfs._keeper.keeper` for one release, for running keepers and older units."""

from ckptfs._keeper.keeper import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
