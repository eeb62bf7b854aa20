"""Exceptions of every shape can be explained, and are never made worse by that."""

from pathlib import Path

import pytest

import ckptfs
from ckptfs._client import failures
from ckptfs._os import mountinfo


class Failing(Exception):
    """Each of its properties fails, and so does its text."""

    @property
    def filename(self) -> str:
        raise RuntimeError("no name")

    @property
    def exceptions(self) -> tuple[Exception, ...]:
        raise RuntimeError("no group")

    def __str__(self) -> str:
        raise RuntimeError("no text")


def noted(notes: object) -> Exception:
    error = ValueError("x")
    error.__dict__["__notes__"] = notes
    return error


def looped() -> Exception:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    first.__context__ = first
    return first


ODD = [
    *(Failing(), looped(), noted(None), noted(5), noted("ckptfs: no list"), noted([None, 5])),
    *(OSError(5, "x", 7), OSError(5, "x", b"/a\xff"), OSError(5, "x", "/a\0b"), OSError()),
    *(OSError(5, "x", "relative"), UnicodeDecodeError("utf-8", b"a", 0, 1, "r")),
]


@pytest.fixture(autouse=True)
def no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SOCKET", "MOUNT", "CACHE_DIR"):
        monkeypatch.setenv(f"CKPTFS_{name}", str(tmp_path / name))
    mount = mountinfo.MountLine("/m", "0:99", mountinfo.FSTYPE, "rw,user_id=0", "/")
    monkeypatch.setattr(failures, "mounts", lambda: [mount])


@pytest.mark.parametrize("error", ODD, ids=range(len(ODD)))
def test_odd_exceptions_have_no_reason(error: Exception) -> None:
    assert ckptfs.explain(error) is None
    with pytest.raises(type(error)) as caught, failures.noting("/m/run"):
        raise error
    assert caught.value is error


def test_the_reason_is_found_in_any_exception_of_a_chain() -> None:
    inner = noted([None, "ckptfs: the reason"])
    outer = Failing()
    outer.__cause__ = inner
    assert ckptfs.explain(outer) == "the reason"


@pytest.mark.parametrize("path", ["/m/run/x", b"/m/run/x", Path("/m/run/x"), b"/m/\xff", "/m/\0"])
def test_paths_of_each_type(path: "str | bytes | Path", capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is there, so the checkpoint has ended; only the text with a NUL names no file."""
    said = ckptfs.explain(path)  # type: ignore[arg-type]
    assert (said is None) == (path == "/m/\0")
    assert capfd.readouterr().err == ""


def test_without_a_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert ckptfs.explain(OSError(5, "x", "relative")) is None
    assert ckptfs.explain("relative") is None
