"""``install-node``: install ckptfs as a service of a node with systemd."""

from pathlib import Path
from typing import Annotated

import typer

from ckptfs._install import node, program


def install_node(
    wheel: Annotated[
        str,
        typer.Argument(
            metavar="WHEEL",
            help="A wheel of ckptfs, a folder with its source, or another requirement of pip. "
            "Default: the ckptfs that runs this command.",
            show_default=False,
        ),
    ] = "",
    prefix: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder of the program.")
    ] = node.PREFIX,
    python: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            envvar="PYTHON",
            help="Python for a new installation. Default: the one that runs this command.",
            show_default=False,
        ),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the steps.")] = False,
    uninstall: Annotated[
        bool, typer.Option("--uninstall", help="Remove ckptfs and its cache.")
    ] = False,
) -> None:
    """Install or upgrade ckptfs as a service of this node, which must run systemd.

    The program gets a virtual environment of its own. The command, mount's helpers, units, man
    pages and completions are links to it. During an upgrade, processes that read wait for a moment.
    DIR/wheels keeps the wheels of ckptfs and pyfuse3 for the environments of the node's users:

    \b
    pip install --prefer-binary --find-links /opt/ckptfs/wheels 'ckptfs[daemon]'
    """
    if uninstall:
        node.uninstall(prefix, dry_run)
    else:
        node.install(prefix, wheel, python or program.default_python(), dry_run)
