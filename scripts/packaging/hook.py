"""A hook of hatchling that makes the files of ``share/`` and adds them to the wheel.

pip lays ``share/`` into the prefix that it installs into (a virtual environment, ``~/.local``,
``/usr/local``), where ``man`` and the shells look for the prefixes of the PATH. The man pages come
from the commands and the pages of the package, the completions from the commands, and the example
from the settings.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMPLETIONS = {
    "bash": "bash-completion/completions/ckptfs",
    "zsh": "zsh/site-functions/_ckptfs",
    "fish": "fish/vendor_completions.d/ckptfs.fish",
}


class Share(BuildHookInterface[Any]):
    """Makes the files in a temporary folder, which ends when the wheel is there."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make them, and name them to hatchling."""
        self.folder = tempfile.TemporaryDirectory(prefix="ckptfs-share-")
        self._make_importable(Path(self.folder.name, "metadata"))
        import example
        import manpages

        share = Path(self.folder.name, "share")
        files = {f"ckptfs/{path}": text for path, text in self._units().items()}
        files["ckptfs/ckptfs.toml"] = example.configuration()
        files |= {COMPLETIONS[shell]: manpages.completion(shell) for shell in COMPLETIONS}
        files |= manpages.pages(Path(self.root, "ckptfs"), self.metadata.version)
        for name, text in files.items():
            path = share / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            build_data["shared_data"][str(path)] = f"share/{name}"

    def _make_importable(self, metadata: Path) -> None:
        """Let the source be imported, which asks `importlib.metadata` for its version."""
        sys.dont_write_bytecode = True  # leaves the source as it is
        sys.path[:0] = [self.root, f"{self.root}/scripts/packaging", str(metadata)]
        folder = metadata / f"ckptfs-{self.metadata.version}.dist-info"
        folder.mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: ckptfs\nVersion: {self.metadata.version}\n"
        (folder / "METADATA").write_text(text)

    def _units(self) -> dict[str, str]:
        source = Path(self.root, "systemd")
        units = {path.relative_to(source): path.read_text() for path in source.rglob("ckptfs.*")}
        return {
            f"systemd/{path}" if path.parts[0] == "user" else f"systemd/system/{path}": text
            for path, text in units.items()
        }

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """End the folder."""
        self.folder.cleanup()
