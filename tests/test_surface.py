"""The surface of the package: names, types, help, logs, and the handle of `ckptfs.mount`."""

import contextlib
import gc
import inspect
import json
import logging
import os
import pickle
import pydoc
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, wait_until
from support.s3server import S3Server

import ckptfs
import ckptfs.ray
from ckptfs import Checkpoint, errors, xattrs

UriOf = Callable[[Path], str]
PAGE = Path(__file__).parents[1] / "ckptfs" / "PYTHON.md"
PUBLIC = {
    "BackgroundUpload",
    "Checkpoint",
    "MountedCheckpoint",
    "explain",
    "mount",
    "upload",
    "xattrs",
}


# -- names


def test_the_package_shows_what_it_has() -> None:
    raised = {cls.__name__ for cls in errors.BY_CODE.values()}
    assert set(ckptfs.__all__) == PUBLIC | raised
    assert set(ckptfs.__all__) | {"__version__", "errors", "ray"} <= set(dir(ckptfs))
    assert not [name for name in dir(ckptfs) if re.match("_[^_]", name)]
    for name in ckptfs.__all__:
        assert getattr(ckptfs, name).__doc__, name


def test_a_star_import_brings_all_of_it_and_hides_no_ray() -> None:
    names: dict[str, Any] = {}
    exec("from ckptfs import *", names)
    assert names.keys() - {"__builtins__"} == set(ckptfs.__all__)
    assert names["Checkpoint"] is Checkpoint
    assert "ray" not in names


def test_submodules_need_no_import_of_their_own() -> None:
    code = (
        "import ckptfs; print(ckptfs.xattrs.__name__, ckptfs.errors.__name__, ckptfs.ray.install)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        assert done.stdout.startswith("ckptfs.xattrs ckptfs.errors <function install")
    else:  # there is no Ray here
        assert "ckptfs.ray.install needs Ray, which is not installed here" in done.stderr
        assert "pip install 'ray[train]'" in done.stderr


def test_the_version() -> None:
    assert ckptfs.__version__ == version("ckptfs")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("Chekpoint", "Checkpoint"),
        ("checkpoint_not_found", "CheckpointNotFound"),
        ("Mount", "mount"),
        ("nonsense", ""),
    ],
)
def test_a_name_that_does_not_exist_is_answered_with_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(AttributeError, match=f"^module 'ckptfs' has no attribute '{wrong}'") as got:
        getattr(ckptfs, wrong)
    hint = str(got.value).partition("; did you mean ")[2]
    assert hint == (f"'{right}'?" if right else "")
    assert not hasattr(ckptfs, wrong)


# -- types

GOOD = """
import os
from pathlib import Path
import ckptfs
from ckptfs import Checkpoint, CkptfsError, MountedCheckpoint, mount, xattrs

version: str = ckptfs.__version__
uploaded: Checkpoint = ckptfs.upload(Path("/tmp/x"), "s3://b/c", metadata={"step": 1})
checkpoint = Checkpoint("s3://bucket/run7/checkpoint_000100")
with checkpoint.as_directory(prefetch=["*.json"], mode="mount") as path:
    names: list[str] = os.listdir(path)
copied: str = checkpoint.to_directory("/tmp/x", progress=True)
handle: MountedCheckpoint = mount(checkpoint, prefetch="all", timeout_s=3)
text: str = Path(handle).joinpath("config.json").read_text() + handle.path
handle.close()
with ckptfs.mount(Path("/tmp/x")) as handle:
    holders: list[int] = xattrs.read(handle.path).holders
try:
    ckptfs.mount("s3://bucket/run7")
except ckptfs.CheckpointNotFound as error:
    known: CkptfsError = error
"""
BAD = {
    "ckptfs.nonsense": '"nonsense" is not a known attribute of module "ckptfs"',
    "from ckptfs import nonsense": '"nonsense" is unknown import symbol',
    "import ckptfs.ray\nckptfs.ray.nonsense": '"nonsense" is not a known attribute',
    'ckptfs.mount("s3://b/c", nonsense=1)': 'No parameter named "nonsense"',
    'ckptfs.mount("s3://b/c", mode="nonsense")': 'cannot be assigned to parameter "mode"',
    'ckptfs.mount("s3://b/c").nonsense': 'Cannot access attribute "nonsense"',
    'ckptfs.Checkpoint("s3://b/c").nonsense': 'Cannot access attribute "nonsense"',
}


def checked_by_pyright(folder: Path, mode: str = "strict") -> list[dict[str, Any]]:
    """What pyright reports about the scripts in `folder`, which use the installed package."""
    pytest.importorskip("pyright")
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": mode}))
    command = "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "."
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False
    )
    return json.loads(done.stdout)["generalDiagnostics"]


def test_a_type_checker_knows_the_names(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    for index, code in enumerate(BAD):
        (tmp_path / f"bad{index}.py").write_text(f"import ckptfs\n{code}\n")
    found: dict[str, str] = {}
    for each in checked_by_pyright(tmp_path):
        name = Path(each["file"]).name
        found[name] = found.get(name, "") + each["message"]
    assert "good.py" not in found, found
    for index, message in enumerate(BAD.values()):
        assert message in found[f"bad{index}.py"]


ARROW_STUB = """
class FileSystem:
    @property
    def type_name(self) -> str: ...
"""
"""Stands for the stubs that a user has installed for pyarrow, which ships none."""
XATTRS = ["CheckpointInfo", "Metadata", "get", "metadata", "read", "read_all", "root_of"]
OF_RAY = ["BroadcastReport", "NodeReport", "Warming", "broadcast", "install", "uninstall", "warm"]
"""The names that have no base class of Ray, because the test does not need Ray."""
# The members of `xattrs.Metadata` are left out, because its values are JSON and so of any type.
RAY_OBJECTS = {
    "warming": ["cancel", "wait"],
    "report": ["bytes", "files", "is_complete", "nodes", "seconds", "version"],
    "node": ["error", "left", "read", "taken"],
}
OBJECTS = {
    "checkpoint": Checkpoint,
    "handle": ckptfs.MountedCheckpoint,
    "info": xattrs.CheckpointInfo,
}


def expressions() -> list[str]:
    """Each public name and each public attribute of the public objects, as a script writes it."""
    found = [f"ckptfs.{name}" for name in [*ckptfs.__all__, "__version__"]]
    found += [f"xattrs.{name}" for name in XATTRS]
    found += [f"ckptfs.ray.{name}" for name in OF_RAY]
    for variable, cls in OBJECTS.items():
        names = [name for name in dir(cls) if not name.startswith("_")]
        found += [f"{variable}.{name}" for name in names]
    found += [f"{variable}.{name}" for variable, names in RAY_OBJECTS.items() for name in names]
    return [*found, "checkpoint.path", "Checkpoint.__init__", "checkpoint.filesystem.type_name"]


def test_surface_of_a_typed_users_script_holds_no_any(tmp_path: Path) -> None:
    stubs = tmp_path / "typings" / "pyarrow"
    stubs.mkdir(parents=True)
    (stubs / "__init__.pyi").write_text("")
    (stubs / "fs.pyi").write_text(ARROW_STUB)
    shown = expressions()
    lines = [
        "import ckptfs",
        "import ckptfs.ray",
        "from ckptfs import Checkpoint, xattrs",
        'checkpoint = Checkpoint("s3://bucket/run7")',
        "handle = ckptfs.mount(checkpoint)",
        "info = xattrs.read(handle.path)",
        "warming = ckptfs.ray.warm(checkpoint)",
        "report = ckptfs.ray.broadcast(checkpoint)",
        'node = report.nodes["id"]',
        *(f"reveal_type({each})" for each in shown),
    ]
    (tmp_path / "script.py").write_text("\n".join(lines) + "\n")
    reports = [
        each for each in checked_by_pyright(tmp_path) if Path(each["file"]).name == "script.py"
    ]
    assert [each["message"] for each in reports if each["severity"] == "error"] == []
    pattern = re.compile(r'Type of "(.*?)" is "(.*)"', re.DOTALL)
    matches = [match for each in reports if (match := pattern.match(each["message"]))]
    types = {match[1]: match[2] for match in matches}
    assert set(types) == set(shown)
    opaque = re.compile(r"\bUnknown\b|(: |-> |\| |^)Any\b|\bAny \|")
    assert {name: text for name, text in types.items() if opaque.search(text)} == {}
    assert types["checkpoint.filesystem"] == "FileSystem"
    assert types["checkpoint.filesystem.type_name"] == "str"
    assert "filesystem: FileSystem | AbstractFileSystem | None" in types["Checkpoint.__init__"]


# -- help


def insides(text: str) -> list[str]:
    """Private names in a help text, but for those that Python puts there."""
    return re.findall(r"(?<![\w_])_[a-z]\w*|\bckptfs\._\w+", text)


@pytest.mark.parametrize("what", [ckptfs, ckptfs.ray, xattrs, errors, Checkpoint, ckptfs.mount])
def test_docstrings_show_no_insides(what: Any) -> None:
    members = [what]
    if what is not ckptfs.ray:  # tests/ray looks at what needs Ray
        members += [getattr(what, name) for name in getattr(what, "__all__", [])]
    for member in members:
        for each in [member, *(vars(member).values() if inspect.isclass(member) else [])]:
            doc = inspect.getdoc(each) if getattr(each, "__doc__", None) else ""
            assert insides(doc or "") == [], each


def test_help_names_what_is_loaded_late() -> None:
    text = pydoc.plain(pydoc.render_doc(ckptfs))
    for name in ("class Checkpoint", "class MountedCheckpoint", "VERSION"):
        assert name in text
    assert re.search(r"\bmount\(\s*checkpoint\b", text)  # Python 3.13 breaks a long signature
    assert text.index("`Checkpoint`") < text.index("PACKAGE CONTENTS")


def test_each_method_has_its_arguments_and_errors_in_its_help() -> None:
    for name in ("as_directory", "to_directory", "from_directory", "__init__"):
        method = getattr(Checkpoint, name)
        doc = inspect.getdoc(method) or ""
        parameters = [p for p in inspect.signature(method).parameters if p != "self"]
        for parameter in parameters:
            assert re.search(rf"^    {parameter}: ", doc, re.MULTILINE), (name, parameter)
    for name in ("as_directory", "to_directory", "get_metadata", "set_metadata", "update_metadata"):
        assert "Raises:" in (inspect.getdoc(getattr(Checkpoint, name)) or "")


def test_mount_has_the_options_of_as_directory() -> None:
    options = dict(inspect.signature(Checkpoint.as_directory).parameters)
    del options["self"]
    taken = dict(inspect.signature(ckptfs.mount).parameters)
    del taken["checkpoint"]
    assert taken == options


# -- the handle


@pytest.mark.mount
def test_a_handle_stays_until_it_is_closed(node: Node, small: Path, uri_of: UriOf) -> None:
    handle = ckptfs.mount(uri_of(small))
    assert isinstance(handle, ckptfs.MountedCheckpoint)
    assert handle.path.startswith(f"{node.mount}/checkpoint-")
    assert sorted(os.listdir(handle)) == ["config.json", "empty", "layers"]
    assert Path(handle, "config.json").read_text() == '{"layers": 1}'
    assert repr(handle.path) in repr(handle)
    assert not handle.closed
    (attachment,) = node.status()["attachments"]
    assert attachment["holders"] == [os.getpid()]
    path = handle.path
    for _ in range(2):
        handle.close()
        assert handle.closed
    wait_until(lambda: not os.path.exists(path))
    assert path not in repr(handle)
    assert "closed" in repr(handle)
    for use in (lambda: handle.path, lambda: os.fspath(handle), handle.__enter__):
        with pytest.raises(ValueError, match=r"was closed.*mount it again with ckptfs.mount"):
            use()


@pytest.mark.mount
def test_the_cells_of_the_python_page(node: Node, small: Path, uri_of: UriOf) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (cells,) = (block for block in blocks if "ckptfs.mount(" in block)
    names: dict[str, Any] = {}
    exec(cells.replace('"s3://bucket/run7/checkpoint_000100"', repr(uri_of(small))), names)
    assert names["config"] == '{"layers": 1}'
    assert names["step_100"].closed


@pytest.mark.mount
def test_a_handle_is_a_context_and_takes_what_a_checkpoint_is(
    node: Node, small: Path, uri_of: UriOf, s3: S3Server, tmp_path: Path
) -> None:
    places: list[Any] = [
        uri_of(small),
        Checkpoint(uri_of(small)),
        Checkpoint(str(small.relative_to(s3.root)), s3.filesystem()),
    ]
    for place in places:
        with ckptfs.mount(place, mode="mount", prefetch=["*.json"]) as handle:
            assert handle.path.startswith(f"{node.mount}/checkpoint-")
        assert handle.closed
    (tmp_path / "file").touch()
    for local in (tmp_path, str(tmp_path), Checkpoint.from_directory(tmp_path)):
        with ckptfs.mount(local) as handle:
            assert handle.path == str(tmp_path)
    with ckptfs.mount(places[0], mode="copy", include=["empty"]) as handle:
        assert os.listdir(handle) == ["empty"]
        copied = handle.path
    assert not os.path.exists(copied)


@pytest.mark.mount
def test_what_cannot_be_mounted_leaves_nothing_open(
    node: Node, bucket: Path, uri_of: UriOf
) -> None:
    with pytest.raises(ckptfs.CheckpointNotFound):
        ckptfs.mount(uri_of(bucket / "nothing"))
    with pytest.raises(ckptfs.LocationError):
        ckptfs.mount("relative/path")
    with pytest.raises(TypeError):
        ckptfs.mount(uri_of(bucket), nonsense=1)  # type: ignore[call-arg]
    gc.collect()  # and no warning of an unclosed handle


@pytest.mark.mount
def test_a_forgotten_handle_is_closed_with_pythons_usual_warning(
    node: Node, small: Path, uri_of: UriOf
) -> None:
    handle = ckptfs.mount(uri_of(small))
    path = handle.path
    with pytest.warns(ResourceWarning, match="unclosed <ckptfs.MountedCheckpoint"):
        del handle
    wait_until(lambda: not os.path.exists(path))


@pytest.mark.mount
@pytest.mark.parametrize("end", ["pass", "import os; os.kill(os.getpid(), 9)"])
def test_a_handle_ends_with_its_process(end: str, node: Node, small: Path, uri_of: UriOf) -> None:
    code = (
        "import sys, ckptfs\nhandle = ckptfs.mount(sys.argv[1])\nprint(handle.path, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code + end, uri_of(small)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        said, errors_said = process.communicate(timeout=60)
    assert process.returncode == (0 if end == "pass" else -9)
    assert errors_said == ""
    wait_until(lambda: not os.path.exists(said.rstrip("\n")))


@pytest.mark.mount
def test_a_forked_child_keeps_the_directory(node: Node, small: Path, uri_of: UriOf) -> None:
    code = """
import os, sys, ckptfs
handle = ckptfs.mount(sys.argv[1])
left, right = os.pipe()
child = os.fork()
if child:
    handle.close()
    os.write(right, b"x")
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os.read(left, 1)
names = sorted(os.listdir(handle))
handle.close()
print(names, handle.closed)
"""
    done = node.run(sys.executable, "-c", code, uri_of(small))
    assert done.stdout == "['config.json', 'empty', 'layers'] True\n"


def test_a_handle_cannot_be_pickled(tmp_path: Path) -> None:
    with (
        ckptfs.mount(tmp_path) as handle,
        pytest.raises(TypeError, match="cannot be pickled, because it belongs to its process"),
    ):
        pickle.dumps(handle)


# -- warnings point to the line of the user


@pytest.mark.parametrize("make", [Checkpoint.as_directory, ckptfs.mount])
def test_a_warning_names_the_users_line(make: Any) -> None:
    checkpoint = Checkpoint("mock:///bucket/run")
    checkpoint.filesystem.create_dir("bucket/run")
    with (
        pytest.warns(UserWarning, match="ckptfs copies the checkpoint") as caught,
        make(checkpoint),
    ):
        pass
    assert [each.filename for each in caught] == [__file__]


# -- descriptors that the user's code closes


@contextlib.contextmanager
def another_file(descriptor: int) -> Iterator[None]:
    """A file with that number, which the code of ckptfs must leave open."""
    other = os.open(__file__, os.O_RDONLY)
    if other != descriptor:
        os.dup2(other, descriptor)
        os.close(other)
    try:
        yield
    finally:
        os.close(descriptor)  # an error, if it is closed


def lease_of(path: str) -> int:
    """The descriptor of this process that is the directory."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == path:
                return int(name)
    raise AssertionError


def lose(checkpoint: Checkpoint, stack: contextlib.ExitStack | None) -> str:
    """Close what holds the checkpoint, and open another file in its place until `stack` ends."""
    with checkpoint.as_directory() as path:
        descriptor = lease_of(path)
        os.close(descriptor)
        if stack is not None:
            stack.enter_context(another_file(descriptor))
    return path


@pytest.mark.mount
@pytest.mark.parametrize("reused", [False, True])
def test_a_closed_lease_is_named_and_another_file_stays_open(
    reused: bool, node: Node, small: Path, uri_of: UriOf
) -> None:
    checkpoint = Checkpoint(uri_of(small))
    with contextlib.ExitStack() as stack:
        with pytest.warns(RuntimeWarning, match=r"closed the descriptor that held") as caught:
            path = lose(checkpoint, stack if reused else None)
        assert len(caught) == 1
        assert path in str(caught[0].message)
        assert caught[0].filename == __file__
    wait_until(lambda: not os.path.exists(path))
    with checkpoint.as_directory() as path:  # and the next one is whole
        assert sorted(os.listdir(path)) == ["config.json", "empty", "layers"]


@pytest.mark.parametrize("reused", [False, True])
def test_a_closed_lock_of_a_copy_is_named_and_the_copy_goes(
    reused: bool, small: Path, uri_of: UriOf
) -> None:
    checkpoint = Checkpoint(uri_of(small))
    with contextlib.ExitStack() as stack:
        handle = ckptfs.mount(checkpoint, mode="copy")
        path = handle.path
        descriptor = lease_of(os.path.dirname(path))
        os.close(descriptor)
        if reused:
            stack.enter_context(another_file(descriptor))
        with pytest.warns(RuntimeWarning, match=r"closed the descriptor that held") as caught:
            handle.close()
        assert path in str(caught[0].message)
        assert caught[0].filename == __file__
        assert not os.path.exists(path)
    with checkpoint.as_directory(mode="copy") as path:
        assert sorted(os.listdir(path)) == ["config.json", "empty", "layers"]


@pytest.mark.mount
def test_a_process_that_closes_all_goes_on(node: Node, small: Path, uri_of: UriOf) -> None:
    code = """
import os, sys, ckptfs
with ckptfs.Checkpoint(sys.argv[1]).as_directory() as path:
    os.closerange(3, 1 << 16)
    files = [open("/dev/null") for _ in range(20)]
print(sum(not file.closed and file.read() == "" for file in files))
"""
    done = node.run(sys.executable, "-c", code, uri_of(small))
    assert done.stdout == "20\n"
    assert done.stderr.count("RuntimeWarning") == 1
    assert "os.closerange or a library that turns the process into a daemon" in done.stderr


# -- logs


@pytest.fixture
def debug(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "ckptfs")
    return caplog


@pytest.mark.mount
def test_the_log_says_which_daemon_and_where(
    node: Node, small: Path, s3: S3Server, debug: pytest.LogCaptureFixture
) -> None:
    uri = s3.uri(str(small.relative_to(s3.root)))
    with Checkpoint(uri).as_directory() as path:
        status = node.status()
    attached, mounted = (
        record.getMessage() for record in debug.records if record.levelno == logging.DEBUG
    )
    size = sum(file.stat().st_size for file in small.rglob("*") if file.is_file())
    assert attached.startswith("attached s3://")
    assert f"(3 files, {size} bytes)" in attached
    assert str(node.socket) in attached
    assert attached.endswith(f"pid {status['pid']}, ckptfs {ckptfs.__version__}")
    assert re.search(rf": {re.escape(path)} after \d+\.\d\d\d s: mounted$", mounted)
    assert f"{s3.access_key}:{s3.secret_key}@" in uri
    assert s3.secret_key not in debug.text


def test_the_log_says_why_it_was_copied(debug: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    checkpoint = Checkpoint("mock:///bucket/run")
    checkpoint.filesystem.create_dir("bucket/run")
    with pytest.warns(UserWarning, match="copies"), checkpoint.as_directory():
        pass
    with checkpoint.as_directory(mode="copy"):
        pass
    with Checkpoint.from_directory(tmp_path).as_directory():
        pass
    auto, copy, local = (record.getMessage() for record in debug.records)
    assert re.search(r" s: copied: a MockFileSystem cannot be mounted", auto)
    assert copy.endswith(" s: copied, as mode='copy' asks")
    assert re.search(rf": {tmp_path} after 0\.\d\d\d s: a local directory$", local)


def test_nothing_is_logged_that_was_not_asked_for() -> None:
    code = "import ckptfs, logging; print(logging.getLogger('ckptfs').handlers)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
