"""The certificate of a store over TLS."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = "openssl req -x509 -newkey rsa:2048 -nodes -days 9 -subj /CN=chaos"
OPENSSL_TIMEOUT_S = 30


def certify(path: Path) -> Path:
    """Write a key and its self-signed certificate for 127.0.0.1.

    Raises OSError and subprocess.SubprocessError if openssl is missing, or fails.
    """
    key = path.with_suffix(".key")
    subprocess.run(
        [*COMMAND.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", path],
        check=True,
        capture_output=True,
        timeout=OPENSSL_TIMEOUT_S,
    )
    with path.open("a") as file:
        file.write(key.read_text())
    key.unlink()
    return path
