"""The files, folders and links of an installation, and the list that ``--uninstall`` reads.

The list, ``PREFIX/installed``, has one path per line. Each path is added to the list before it is
made, so ``--uninstall`` can also remove an interrupted installation.
"""

import os
import shlex
import subprocess
from pathlib import Path

from ckptfs._install import InstallError


def say(text: str) -> None:
    """Print a message to the operator."""
    print(f"install-node: {text}", flush=True)


class Record:
    """Makes folders, files and links, and runs commands. A dry run only prints them."""

    def __init__(self, prefix: Path, dry_run: bool) -> None:
        self.prefix = prefix
        self.dry_run = dry_run
        self._list = prefix / "installed"
        self._shown: set[Path] = set()

    def exists(self) -> bool:
        """Whether install-node has made the prefix."""
        return self._list.is_file()

    def begin(self) -> None:
        """Make the prefix and the list, if they do not exist."""
        if not self.dry_run:
            self.prefix.mkdir(parents=True, exist_ok=True)
            self._list.touch()

    def paths(self) -> list[Path]:
        """The paths on the list, in the order in which they were made."""
        return [Path(line) for line in self._list.read_text().splitlines()]

    def run(self, *command: str | Path) -> None:
        """Run a command; a dry run prints it.

        Raises:
            InstallError: The command failed.
        """
        if self.dry_run:
            print(shlex.join(map(str, command)))
            return
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise InstallError(f"failed: {shlex.join(map(str, command))}: {error}") from None

    def write(self, path: Path, text: str) -> None:
        """Make a file that all users can read, or replace it atomically.

        Raises:
            InstallError: The path is a link, which could lead anywhere.
        """
        if path.is_symlink():
            raise InstallError(f"{path} is a link that ckptfs has not made; remove it")
        self._make_folder(path.parent)
        self._note(path, "write")
        if not self.dry_run:
            new = path.with_name(f"{path.name}.new")
            new.write_text(text)
            new.chmod(0o644)
            new.replace(path)

    def link(self, path: Path, target: Path) -> None:
        """Make a link.

        Raises:
            InstallError: The path exists and is not this link.
        """
        is_there = path.is_symlink() or path.exists()
        if is_there and not (path.is_symlink() and path.readlink() == target):
            raise InstallError(f"{path} exists, and ckptfs has not made it; remove it")
        self._make_folder(path.parent)
        self._note(path, "link")
        if not (self.dry_run or is_there):
            path.symlink_to(target)

    def remove_dead_links(self) -> None:
        """Remove the links to files that this version no longer has."""
        if self.dry_run or not self.exists():
            return
        kept: list[Path] = []
        for path in self.paths():
            if path.is_symlink() and not path.exists():
                path.unlink()
            else:
                kept.append(path)
        new = self._list.with_suffix(".new")
        new.write_text("".join(f"{path}\n" for path in kept))
        new.replace(self._list)

    def remove(self, keep: Path | None) -> None:
        """Remove the files on the list except `keep`, the last one first, and empty folders."""
        for path in reversed(self.paths()):
            if path == keep:
                say(f"kept {path}, because it was changed")
            elif path.is_dir() and not path.is_symlink():
                self.run("rmdir", "--ignore-fail-on-non-empty", path)
            else:
                self.run("rm", "-f", path)

    def _make_folder(self, path: Path) -> None:
        if not path.is_dir():
            self._make_folder(path.parent)
            self._note(path, "mkdir")
            if not self.dry_run:
                path.mkdir(mode=0o755)

    def _note(self, path: Path, verb: str) -> None:
        if self.dry_run:
            if path not in self._shown:
                print(f"{verb} {path}")
            self._shown.add(path)
        elif path not in self.paths():
            with self._list.open("a") as file:
                file.write(f"{path}\n")
                file.flush()
                os.fsync(file.fileno())
