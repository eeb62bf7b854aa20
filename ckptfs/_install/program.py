"""The program of a node: a virtual environment, and a folder of wheels.

``PREFIX/wheels`` keeps the wheels of ckptfs and pyfuse3, because the index has no wheel of pyfuse3.
An upgrade uses the kept wheel of pyfuse3. The node's users need no compiler either, with
``pip install --prefer-binary --find-links PREFIX/wheels 'ckptfs[daemon]'``.
"""

import base64
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ckptfs._install import InstallError
from ckptfs._install.record import Record, say

_OF_INSTALLERS = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
"""Files of ``*.dist-info`` that the installer writes, and that a wheel must not contain."""
_FUSE_HEADER = Path("/usr/include/fuse3/fuse.h")
_HAS_HEADERS = """
import os, sysconfig
raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
"""


def install(record: Record, what: str, python: str) -> None:
    """Make or upgrade the environment.

    Args:
        record: The list of the prefix.
        what: A wheel, a folder with the source, or another requirement of pip; "" for the running
            ckptfs.
        python: The interpreter.

    Raises:
        InstallError: A package of the system is missing, or pip failed.
    """
    wheels = record.prefix / "wheels"
    _check(python, record.dry_run)
    own = record.prefix / "bin/python"
    if not own.exists():
        record.run(python, "-m", "venv", record.prefix)
    pip = [own, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check"]
    say(f"installing {what or 'this ckptfs'} into {record.prefix}")
    with tempfile.TemporaryDirectory(prefix="ckptfs-install-") as temp:
        if not what:
            what = str(Path(temp, "ckptfs.whl") if record.dry_run else pack(Path(temp)))
        made = Path(temp, "made")
        record.run(*pip, "wheel", "--no-cache-dir", "--no-deps", "--wheel-dir", made, what)
        wheel = made / "ckptfs.whl" if record.dry_run else _only_wheel(made)
        find = ["--no-cache-dir", "--prefer-binary", "--find-links", wheels]
        pyfuse3 = "pyfuse3" if record.dry_run else _requirement(wheel, "pyfuse3")
        made_by = [*pip, "wheel", *find, "--no-deps", "--wheel-dir", wheels, pyfuse3]
        _build_pyfuse3(record, python, *made_by)
        record.run(*pip, "install", *find, f"{wheel}[daemon]")
        # pip skips an equal version, so this forces it.
        record.run(*pip, "install", "--no-cache-dir", "--no-deps", "--force-reinstall", wheel)
        if not record.dry_run:
            for old in wheels.glob("ckptfs-*.whl"):
                old.unlink()
            shutil.copy(wheel, wheels / wheel.name)


def check_source(what: str) -> None:
    """Raise InstallError if `what` is the path of a wheel or a folder, and nothing is there."""
    path = what.partition("[")[0]  # extras may follow
    is_path = path.startswith(("/", ".")) or (path.endswith(".whl") and "://" not in path)
    if is_path and not Path(path).exists():
        raise InstallError(
            f"{path} does not exist; name a wheel of ckptfs, or the folder with its source"
        )


def _only_wheel(folder: Path) -> Path:
    found = list(folder.glob("ckptfs-*.whl"))
    if len(found) != 1:
        raise InstallError("pip built no ckptfs; name its wheel, or the folder with its source")
    return found[0]


def _requirement(wheel: Path, name: str) -> str:
    """Return a wheel's requirement of a package of its extra ``daemon``."""
    [found] = importlib.metadata.distributions(name="ckptfs", path=[str(wheel)])
    for line in found.requires or []:
        if line.startswith(name):
            return line.partition(";")[0].strip()
    raise InstallError(f"{wheel.name} does not require {name}; name a wheel of ckptfs")


def _check(python: str, dry_run: bool) -> None:
    """Raise InstallError with all missing packages, by their names in Debian."""
    if not _succeeds(python, "-c", "import sys; sys.exit(sys.version_info < (3, 10))"):
        raise InstallError(f"{python} is not a Python >= 3.10; name one with --python")
    missing = ["fuse3"] * (not shutil.which("fusermount3"))
    missing += ["python3-venv"] * (not _succeeds(python, "-c", "import ensurepip, venv"))
    if missing and not dry_run:
        raise _missing(missing)


def _missing(names: list[str]) -> InstallError:
    listed = " ".join(names)
    return InstallError(f"missing: {listed}; on Debian or Ubuntu: apt-get install {listed}")


def _build_pyfuse3(record: Record, python: str, *command: str | Path) -> None:
    """Run pip, which compiles pyfuse3 unless it finds a wheel."""
    try:
        record.run(*command)
    except InstallError:
        missing = [name for name in ("gcc", "pkg-config") if not shutil.which(name)]
        missing += ["libfuse3-dev"] * (not _has_fuse_header())
        missing += ["python3-dev"] * (not _succeeds(python, "-c", _HAS_HEADERS))
        if not missing:
            raise
        raise _missing(missing) from None


def _has_fuse_header() -> bool:
    return _FUSE_HEADER.exists() or _succeeds("pkg-config", "--exists", "fuse3")


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    except OSError:
        return False


def pack(folder: Path) -> Path:
    """Make a wheel of the running ckptfs from the files that pip installed; returns its path.

    The layout is PyPA's "Binary distribution format". ``NAME-VERSION.data/data`` has the files that
    pip puts into ``share/``. pip itself makes the programs in ``bin/``.

    Raises:
        InstallError: pip has not installed this ckptfs.
    """
    try:
        installed = importlib.metadata.distribution("ckptfs")
    except importlib.metadata.PackageNotFoundError:
        raise InstallError("pip has not installed this ckptfs; name a wheel") from None
    name = f"ckptfs-{installed.version}"
    lines: list[str] = []
    wheel = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in installed.files or []:
            inside = _path_in_wheel(str(file), name)
            if inside:
                content = Path(str(installed.locate_file(file))).read_bytes()
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
                lines.append(f"{inside},sha256={digest.decode()},{len(content)}\n")
                archive.writestr(inside, content)
        listing = f"{name}.dist-info/RECORD"
        archive.writestr(listing, "".join([*lines, f"{listing},,\n"]))
    if not lines:
        raise InstallError("pip has not installed this ckptfs; name a wheel")
    return wheel


def _path_in_wheel(path: str, name: str) -> str | None:
    """Return the path in the wheel of an installed file; None if the wheel does not have it."""
    if path.startswith(".."):
        outside = path.lstrip("./")
        return f"{name}.data/data/{outside}" if outside.startswith("share/") else None
    if path.endswith(".pyc") or path.split("/")[-1] in _OF_INSTALLERS:
        return None
    return path


def default_python() -> str:
    """Return the base interpreter, also if this process runs in a virtual environment."""
    base: str = getattr(sys, "_base_executable", sys.executable)
    return os.path.realpath(base)
