"""What proc(5) says of processes. They are gone, or in a namespace that we do not see, at any time:
then there is no answer, and no error.

Only `command` may wait: a command line lies in the process's own memory, whose lock may be held by
a page fault on our mount, which waits for us. So it is not for the event loop.
"""

import os
import re

_TGID = re.compile(rb"\nTgid:\s*(\d+)")
_READ_BYTES = 4096
_WORD_LENGTH_MAX = 40


def process_of(thread: int) -> int:
    """The process that a thread belongs to: FUSE tells the thread's id."""
    found = _TGID.search(_read(f"/proc/{thread}/status"))  # it is one of the first lines
    return int(found[1]) if found else thread


def started(pid: int) -> int:
    """When the process began, in ticks since the machine did; 0: nobody knows. With it, an id that
    is used again names another process."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return int(fields[19]) if len(fields) > 19 else 0  # the 22nd in all


def owner(pid: int) -> int:
    """The user whose process it is; -1: nobody knows."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return -1


def name(pid: int) -> str:
    """What the kernel calls it, as "python3"; "": it is gone."""
    return _printable(_read(f"/proc/{pid}/comm").decode(errors="replace").strip())


def command(pid: int) -> str:
    """Blocking. Its program, and what it runs, as "python3 train.py"; "": it is gone.

    Not the whole command line, and no word that may hold a secret (a URI, a setting).
    """
    words = [os.fsdecode(word) for word in _read(f"/proc/{pid}/cmdline").split(b"\0") if word]
    if not words:
        return ""
    program, *arguments = words
    called = os.path.basename(program.split(" ")[0])
    runs = next((word for word in arguments if not word.startswith("-")), "")
    if "://" in runs or "=" in runs or "\n" in runs or " " in runs:
        runs = ""
    shown = f"{called[:_WORD_LENGTH_MAX]} {os.path.basename(runs)[:_WORD_LENGTH_MAX]}"
    return _printable(shown.strip())


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(_READ_BYTES)
    except OSError:
        return b""
