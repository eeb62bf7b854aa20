"""A filesystem whose files make their library hang, hold the lock, or end the process.

The name of a file says which fault its opening causes: `hang`, `hold-0.5` (seconds, with the lock
of the interpreter), `hold-gate` (with the lock, until a process opens the FIFO `gate` in `seen` to
write), `sleep-0.5`, `gate` (waits for the file `open` in `seen`), `abort`, `exit-7`, `stop`,
`deny`, `odd`; with `once-` before it, only the first time. A directory with such a name does so
when it is listed. Other files are ordinary.
"""

import ctypes
import os
import signal
import time
from pathlib import Path

from pyarrow import fs


def misbehave(name: str) -> None:
    """Do what the name says."""
    what, _, argument = name.partition("-")
    if what == "hang":
        while True:
            time.sleep(60)
    elif what == "hold":
        ctypes.PyDLL(None).usleep(int(float(argument) * 1e6))
    elif what == "sleep":
        time.sleep(float(argument))
    elif what == "abort":
        os.abort()
    elif what == "exit":
        os._exit(int(argument))
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.1)  # another thread may have taken the signal
    elif what == "deny":
        raise PermissionError("no")
    elif what == "odd":
        raise ZeroDivisionError("S3CR3T")


class Faulty(fs.FileSystemHandler):
    """The directory `below`; `seen`: where it is noted what was opened already."""

    def __init__(self, below: str, seen: str) -> None:
        self.inner = fs.SubTreeFileSystem(below, fs.LocalFileSystem())
        self.seen = seen

    def _act(self, path: str) -> None:
        name = path.rsplit("/", 1)[-1]
        if name.startswith("once-"):
            try:
                (Path(self.seen) / name).touch(exist_ok=False)
            except FileExistsError:
                return
            name = name[len("once-") :]
        while name == "gate" and not (Path(self.seen) / "open").exists():
            time.sleep(0.01)
        if name == "hold-gate":
            ctypes.PyDLL(None).open(os.fsencode(Path(self.seen) / "gate"), os.O_RDONLY)
        else:
            misbehave(name)

    def get_type_name(self) -> str:
        return "faulty"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> object:
        return self.inner.get_file_info(paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> object:
        self._act(selector.base_dir)
        return self.inner.get_file_info(selector)

    def open_input_file(self, path: str) -> object:
        self._act(path)
        return self.inner.open_input_file(path)

    def open_output_stream(self, path: str, metadata: object) -> object:
        self._act(path.rpartition(".")[0])  # it is written beside the file
        return self.inner.open_output_stream(path)

    def move(self, source: str, destination: str) -> None:
        self.inner.move(source, destination)

    def delete_file(self, path: str) -> None:
        self.inner.delete_file(path)


Faulty.__abstractmethods__ = frozenset()
