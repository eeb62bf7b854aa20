"""The start of a daemon on demand, independent of the job that needs it first.

A daemon serves all processes of a user on a node, and outlives the process that started it. So its
keeper gets a small environment (`kept_environment`), and leaves the job:

- With systemd, ``systemd-run --scope`` puts the keeper into a scope of its own. The scope belongs
  to the system for root, and otherwise to the user's service manager. This manager ends with the
  user's last session unless the user lingers (``loginctl enable-linger``). Without lingering the
  keeper stays in the job.
- Without systemd the keeper moves itself (``ckptfs._keeper.background``), which needs root.

Otherwise the daemon ends with the job, and clients in other jobs get a warning (`ckptfs._os.jobs`).
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ckptfs._model.config import Config
from ckptfs._os.jobs import has_systemd
from ckptfs._store.kinds import CA_FILES, PROXIES, TRAVELLING
from ckptfs.errors import BY_CODE, DaemonError

_OF_THE_USER = ("HOME", "LANG", "LANGUAGE", "LOGNAME", "PATH", "TZ", "USER")
_OF_CKPTFS = ("CKPTFS_CACHE_DIR", "CKPTFS_CONFIG", "CKPTFS_MOUNT", "CKPTFS_SOCKET")
_OF_PROGRAMS = (
    # Only these variables may lead to Python and libraries (conda, environment modules).
    *("LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "PYTHONNOUSERSITE"),
    *("PYTHONPATH", "PYTHONUSERBASE"),
    # The Java machine that reads HDFS.
    *("ARROW_LIBHDFS_DIR", "CLASSPATH", "JAVA_HOME", "KRB5CCNAME", "KRB5_CONFIG", "LIBHDFS_OPTS"),
)
_OF_THE_MACHINE = (
    # Proxies and certificates for the stores, and the services for the machine's identity.
    *(*PROXIES, *(name.lower() for name in PROXIES), *CA_FILES, "AWS_CA_BUNDLE"),
    *("AWS_EC2_METADATA_DISABLED", "AWS_EC2_METADATA_SERVICE_ENDPOINT"),
    *("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "AWS_METADATA_SERVICE_NUM_ATTEMPTS"),
    *("AWS_METADATA_SERVICE_TIMEOUT", "GCE_METADATA_HOST", "GCE_METADATA_IP", "NO_GCE_CHECK"),
    *("IDENTITY_ENDPOINT", "IDENTITY_HEADER", "MSI_ENDPOINT", "MSI_SECRET"),
    # A daemon accepts keys of all types only from the file in its own environment.
    "GOOGLE_APPLICATION_CREDENTIALS",
)
_KEPT = frozenset((*_OF_THE_USER, *_OF_CKPTFS, *_OF_PROGRAMS, *_OF_THE_MACHINE))
_KEPT_PREFIXES = ("LC_", "XDG_", "HADOOP_")
_SYSTEMD_PRIVATE = "systemd/private"
"""Socket of a service manager below its runtime directory."""
_LINGERING = Path("/var/lib/systemd/linger")
"""Folder with a file for each user who lingers (loginctl(1))."""


def kept_environment(environ: Mapping[str, str], config: Config) -> dict[str, str]:
    """The environment of a daemon on demand, from that of the process that starts it.

    It has no credentials, because each request brings those of its user. It has TMPDIR only if the
    daemon's own files are there, because a scheduler removes a job's folder with the job.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if name in _KEPT or name.startswith(_KEPT_PREFIXES)
    }
    for name in _travelling_in(kept, config):
        del kept[name]
    folder = environ.get("TMPDIR", "")
    own = (config.socket, config.mount, config.cache_dir)
    if folder and any(Path(path).is_relative_to(folder) for path in own):
        kept["TMPDIR"] = folder
    return kept


def _travelling_in(environ: Mapping[str, str], config: Config) -> set[str]:
    sources = [table.credentials for table in config.store.values()]
    prefixes = {"", *(s.environment for s in sources if not isinstance(s, str))}
    found = {prefix + name for prefix in prefixes for name in TRAVELLING} & environ.keys()
    proxies = {each for name in PROXIES for each in (name, name.lower())} & environ.keys()
    return found | {name for name in proxies if "@" in environ[name]}  # has a password


def scope_command(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The words before a command that run it in a scope of systemd, outside of this process's job.
    Empty if no service manager would keep the scope."""
    program = shutil.which("systemd-run", path=environ.get("PATH"))
    if program is None or not has_systemd():
        return []
    words = [program, "--scope", "--quiet", "--collect"]
    if os.geteuid() == 0:
        return [*words, "--description=ckptfs"]
    runtime = environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    if not lingers() or not os.access(os.path.join(runtime, _SYSTEMD_PRIVATE), os.W_OK):
        return []
    runtime_of = ["env", f"XDG_RUNTIME_DIR={runtime}"]
    return [*runtime_of, *words[:1], "--user", *words[1:], "--description=ckptfs"]


def lingers() -> bool:
    """Whether this user's service manager outlives the user's sessions."""
    import pwd

    try:
        return (_LINGERING / pwd.getpwuid(os.geteuid()).pw_name).exists()
    except (KeyError, OSError):
        return False


def run_keeper(
    options: Sequence[str],
    environment: Mapping[str, str],
    given: bytes = b"",
    scope: Sequence[str] = (),
) -> dict[str, str]:
    """Run the keeper until it has gone to the background. Return its report.

    Args:
        options: Options of the keeper's command line.
        environment: The keeper's whole environment.
        given: Its standard input.
        scope: Words before the command, see `scope_command`. If these fail, the keeper starts
            without them.

    Raises:
        CannotMount, ConfigError, DaemonError: The keeper's report has this error, or is missing.
    """
    run = functools.partial(
        subprocess.run,
        cwd="/",  # because "-m" puts the working directory on the module path
        env=environment,
        input=given,
        capture_output=True,
        check=False,
    )
    command = [sys.executable, "-m", "ckptfs._keeper.keeper", *options]
    done = run([*scope, *command])
    if scope and not done.stdout:
        done = run(command)
    try:
        told: dict[str, str] = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise DaemonError(f"the ckptfs daemon did not start: {last or done.returncode}") from None
    if "code" in told:
        raise BY_CODE.get(told["code"], DaemonError)(told["message"])
    return told
