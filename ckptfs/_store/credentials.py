"""Credentials of a named store: from a file or from the environment.

**Files** have to be as private as ssh wants a key to be: they belong to this user or root, and
others may not read them. The next request reads a file that has changed (a rotation). If the new
file is missing or invalid, the last valid credentials stay in use, and one line is logged.

The names in a file are those of AWS's credentials files, those of the output (JSON) of a
`credential_process`, or the options of the filesystem: see `kinds`.
"""

import configparser
import json
import logging
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ckptfs._model.kinds import Kind
from ckptfs._model.named_store import CredentialSource
from ckptfs._os.ownership import is_this_users_alone
from ckptfs._store.kinds import KINDS
from ckptfs.errors import AccessDenied

log = logging.getLogger(__name__)

_FILE_BYTES_MAX = 64 << 10


class SecretFile:
    """The current credentials in a file. Any thread may use it.

    `path` is that of the configuration. `profile` is the section of an INI file; "" for
    ``default``, or for the only section.
    """

    def __init__(self, path: str, profile: str, kind: Kind) -> None:
        self._path = _absolute(path)
        self._profile = profile
        self._kind: Kind = kind
        self._lock = threading.Lock()  # guards the two below
        self._seen: tuple[int, ...] = ()
        self._secrets: dict[str, str] | None = None

    def current(self) -> dict[str, str]:
        """The secrets by the name of the filesystem's option. Raises AccessDenied if the file never
        had valid ones."""
        with self._lock:
            try:
                now = _signature(os.stat(self._path))
            except OSError:
                now = (0,)
            if now != self._seen:
                self._seen = now
                try:
                    self._secrets = self._read()
                except AccessDenied as error:
                    if self._secrets is None:
                        self._seen = ()
                        raise
                    log.warning("%s; its former credentials stay in use", error)
            assert self._secrets is not None
            return self._secrets

    def _read(self) -> dict[str, str]:
        try:
            with open(self._path, "rb", opener=open_at_once) as file:
                _refuse_others(self._path, os.fstat(file.fileno()))
                text = file.read(_FILE_BYTES_MAX).decode()
        except AccessDenied:  # which is an OSError, too
            raise
        except OSError as error:
            raise AccessDenied(
                f"credentials {self._path}: {error.strerror}; check the store's table"
            ) from None
        except UnicodeDecodeError:
            raise AccessDenied(
                f"credentials {self._path} are not UTF-8 text; check the store's table"
            ) from None
        values = _of_json(text) if text.lstrip().startswith("{") else _of_ini(text, self._profile)
        if values is None:  # the message shows nothing of the text
            raise AccessDenied(
                f"credentials {self._path}: neither a JSON object of strings nor an INI file with "
                f"the section [{self._profile or 'default'}]; correct the file or the profile"
            )
        return _picked(values, self._kind, f"credentials {self._path}")


def environment_secrets(
    source: CredentialSource, kind: Kind, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The secrets in variables with a prefix. Raises AccessDenied if they are incomplete."""
    prefix = source.environment
    known = {name for names in KINDS[kind].in_files.values() for name in names[:1]}
    values = {name: environ.get(prefix + name.upper(), "") for name in known}
    return _picked(values, kind, f"credentials in the environment ({prefix}…)", prefix)


def given_secrets(values: Mapping[str, str], kind: Kind, where: str) -> dict[str, str]:
    """The secrets among `values`, whose names are those in files, in any letter case.

    `where` describes their place, for messages. Raises AccessDenied if they are incomplete, or if
    one has an unknown name.
    """
    known = {name.lower(): name for names in KINDS[kind].in_files.values() for name in names}
    if not known:
        raise AccessDenied(f"{where}: this store takes no credentials; leave them out")
    if unknown := sorted(name for name in values if name.lower() not in known):
        raise AccessDenied(
            f"{where}: unknown {', '.join(unknown)}; this store has {', '.join(known.values())}"
        )
    return _picked({known[name.lower()]: value for name, value in values.items()}, kind, where)


def _picked(
    values: Mapping[str, str], kind: Kind, where: str, prefix: str | None = None
) -> dict[str, str]:
    found = {
        option: next((values[name] for name in names if values.get(name)), "")
        for option, names in KINDS[kind].in_files.items()
    }
    if not any(all(found[option] for option in group) for group in KINDS[kind].needed):
        groups = [
            [KINDS[kind].in_files[option][0] for option in group] for group in KINDS[kind].needed
        ]
        if prefix is not None:
            groups = [[prefix + name.upper() for name in group] for group in groups]
        wanted = ", or ".join(" and ".join(group) for group in groups)
        raise AccessDenied(f"{where}: incomplete; set {wanted}")
    return {option: value for option, value in found.items() if value}


def _absolute(path: str) -> Path:
    """The absolute path. systemd says where a relative path is (LoadCredential= in
    systemd.exec(5))."""
    if os.path.isabs(path):
        return Path(path)
    directory = os.environ.get("CREDENTIALS_DIRECTORY", "")
    if not directory:
        raise AccessDenied(
            f"credentials {path}: a relative path is one in $CREDENTIALS_DIRECTORY, which is not "
            "set; give an absolute one, or LoadCredential= in the unit"
        )
    return Path(directory, path)


def open_at_once(path: str, flags: int) -> int:
    """An opener for `open` that does not wait for the writer of a FIFO."""
    return os.open(path, flags | os.O_NONBLOCK)


def _signature(info: os.stat_result) -> tuple[int, ...]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _refuse_others(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise AccessDenied(f"credentials {path} is not a regular file; name one")
    # A group may read: what Kubernetes and systemd hand to a service is its group's.
    if not is_this_users_alone(info, 0o027, or_roots=True):
        raise AccessDenied(
            f"credentials {path}: the file belongs to another user, or others can read it, or its "
            "group can write it; chmod 600, or chown it"
        )


def _of_json(text: str) -> dict[str, str] | None:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    values = cast("dict[str, Any]", found)
    return {name: value for name, value in values.items() if isinstance(value, str)}


def _of_ini(text: str, profile: str) -> dict[str, str] | None:
    parser = configparser.RawConfigParser(default_section="")
    try:
        parser.read_string(text)
    except configparser.Error:
        return None
    names = parser.sections()
    name = profile or ("default" if "default" in names or len(names) != 1 else names[0])
    return dict(parser.items(name)) if name in names else None
