"""Unknown variables of the environment that begin like ckptfs's own. Most of them are misspelt."""

import os
import re
import sys
from collections.abc import Mapping

from ckptfs._config.load import INTERNAL_VARIABLES, VARIABLES

_PREFIX = "CKPTFS_"
_OF_OTHERS = re.compile(r"CKPTFS_(?:TEST_|.*(?:PORT|SERVICE_HOST)\b|.*PORT_).*")
"""Variables of the tests, and variables that Kubernetes sets for a service called ckptfs (or
ckptfs-metrics): ``CKPTFS_SERVICE_HOST``, ``CKPTFS_PORT_80_TCP_ADDR`` and so on."""


def unknown(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the unknown variables ``CKPTFS_…``, each with the nearest known one, or "" if none is
    near."""
    known = {*VARIABLES, *INTERNAL_VARIABLES}
    found = [name for name in environ if name.startswith(_PREFIX) and name not in known]
    found = [name for name in sorted(found) if not _OF_OTHERS.fullmatch(name)]
    if not found:
        return {}
    import difflib  # here, for the start-up time of each command

    # The comparison leaves out the prefix, which makes all of them alike.
    ends = [name.removeprefix(_PREFIX) for name in VARIABLES]
    near = {name: difflib.get_close_matches(name.removeprefix(_PREFIX), ends, 1) for name in found}
    return {name: f"{_PREFIX}{ends[0]}" if ends else "" for name, ends in near.items()}


def hint(near: str) -> str:
    """Return the remedy for an unknown variable, by the nearest known one."""
    return f"did you mean {near}?" if near else f"ckptfs knows {', '.join(VARIABLES)}"


def warn_of_unknown() -> None:
    """Print a line on standard error for each unknown variable. The command ignores them."""
    for name, near in unknown().items():
        print(f"ckptfs: warning: the variable {name} has no effect; {hint(near)}", file=sys.stderr)
