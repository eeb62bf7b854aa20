"""The progress bar: on a terminal, in a notebook, and where there is neither."""

import builtins
import contextlib
import io
import os
import pty
import sys
import threading
import types
from typing import Any

import pytest

from ckptfs._os import progress_bar as _progress
from ckptfs._os.progress_bar import progress_bar

MIB = 1 << 20


class ZMQInteractiveShell:
    """A kernel of Jupyter is known by the name of this class."""


class Handle:
    """What a notebook shows."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def update(self, data: dict[str, str], *, raw: bool) -> None:
        assert raw
        assert data.keys() == {"text/plain"}
        self.shown.append(data["text/plain"])


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Handle:
    """This process is a kernel, without ipywidgets."""
    handle = Handle()

    def display(data: dict[str, str], *, raw: bool, display_id: bool) -> Handle:
        assert display_id
        handle.update(data, raw=raw)
        return handle

    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    package, module = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    vars(module)["display"] = display
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    return handle


def test_a_notebook_shows_a_bar_and_keeps_it(
    notebook: Handle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "_NOTEBOOK_INTERVAL_S", 0.0)
    with progress_bar("copying [run]/ckpt") as show:
        show(3 * MIB, 10 * MIB)
        show(10 * MIB, 10 * MIB)
    assert notebook.shown[0].startswith("copying [run]/ckpt")
    assert "3.0/10.0 MiB" in notebook.shown[1]
    assert "10.0/10.0 MiB" in notebook.shown[-1]
    assert all("\n" not in line and "\x1b" not in line for line in notebook.shown)
    assert all(len(line) <= 100 for line in notebook.shown)
    assert capsys.readouterr() == ("", "")


def test_a_notebook_is_not_flooded_and_sees_the_end(
    notebook: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "_NOTEBOOK_INTERVAL_S", 3600.0)
    monkeypatch.setattr(_progress.time, "monotonic", lambda: 10_000.0)
    with progress_bar("copying") as show:
        for done in range(1, 1001):
            show(done, 1000)
    # At the start, with the first bytes, at the last one, and at the end of the context.
    assert len(notebook.shown) == 4
    assert "1,000/1,000 bytes" in notebook.shown[-1]


def test_a_count_leaves_a_notebook_when_it_ends(notebook: Handle) -> None:
    with progress_bar("reading metadata", of_bytes=False) as show:
        show(2, 7)
        assert "2/7" in notebook.shown[-1]
    assert notebook.shown[-1] == ""


def test_notebook_bar_is_updated_from_threads(notebook: Handle) -> None:
    with progress_bar("copying") as show:
        threads = [threading.Thread(target=show, args=(i, 4)) for i in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert notebook.shown


def test_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress_bar("copying ckpt") as show:
            show(5, 5)
    said = b""
    with contextlib.suppress(OSError):  # EIO: all of it was read, and the other end is closed
        while True:
            said += os.read(ours, 1 << 16)
    os.close(ours)
    assert "copying ckpt" in said.decode()
    assert "5/5 bytes" in said.decode()


def test_pipe_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    pipe: Any = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with progress_bar("copying") as show:
        show(5, 5)
    assert pipe.getvalue() == ""
