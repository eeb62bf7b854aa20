"""Facts about processes from proc(5).

A process may end at any time, or be in a namespace that this process does not see. Then each
function returns its value for an unknown process, and raises no error.

Only `command` may block. A command line lies in the process's own memory, whose lock a page fault
on the mount may have taken, and that page fault waits for the daemon. So the event loop must not
call `command`.
"""

import os
import re

_TGID = re.compile(rb"\nTgid:\s*(\d+)")
_FILESYSTEM_UID = re.compile(rb"\nUid:(?:\s+\d+){3}\s+(\d+)")
_KERNEL_THREAD = re.compile(rb"\nKthread:\s*1")
_READ_BYTES = 4096
_WORD_LENGTH_MAX = 40


def process_of(thread: int) -> int:
    """The process of a thread. FUSE names the thread."""
    found = _TGID.search(_read(f"/proc/{thread}/status"))  # one of the first lines
    return int(found[1]) if found else thread


def user_of(thread: int) -> int:
    """The user as whom a thread accesses files; -1 if unknown.

    A thread that waits in a system call cannot change its user. So the answer is right for a
    request of that thread, as long as the daemon does nothing but reply to it. A thread of the
    kernel, for example of its NFS server, acts for users whom only the kernel knows.
    """
    status = _read(f"/proc/{thread}/status")
    found = _FILESYSTEM_UID.search(status)
    return int(found[1]) if found and not _KERNEL_THREAD.search(status) else -1


def started(pid: int) -> int:
    """When the process began, in ticks since the machine booted; 0 if unknown. It tells processes
    apart that have the same id one after the other."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return int(fields[19]) if len(fields) > 19 else 0  # the 22nd field


def owner(pid: int) -> int:
    """The user of the process; -1 if unknown."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return -1


def name(pid: int) -> str:
    """The kernel's name of the process, such as "python3"; "" if unknown."""
    return _printable(_read(f"/proc/{pid}/comm").decode(errors="replace").strip())


def command(pid: int) -> str:
    """Blocking. The process's program and its first argument, such as "python3 train.py"; "" if
    unknown.

    The text leaves out the rest of the command line, and an argument that may contain a secret (a
    URI, a setting).
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
