"""``ckptfs install-node``: what it makes on a node, and that it removes all of it again.

The installation of the program itself, with packages from an index, is tried by
``scripts/systemd-proof`` and by hand.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest
from support.worlds import OWN_MOUNTS

from ckptfs._install import InstallError, node, program
from ckptfs._install.record import Record

OTHER = 65533
CKPTFS = Path(sys.executable).with_name("ckptfs")
NODE_FOLDERS = ("etc", "usr/local", "usr/sbin", "sbin")
IN_A_NODE_OF_ITS_OWN = """
work=$1; shift
mount -t tmpfs tmpfs "$work"
for folder in {folders}; do
  if [ -L "/$folder" ]; then continue; fi
  mkdir -p "$work/$folder/up" "$work/$folder/work"
  mount -t overlay overlay "/$folder" \
    -o "lowerdir=/$folder,upperdir=$work/$folder/up,workdir=$work/$folder/work"
done
exec "$@"
"""
"""Changes of these folders are gone with the mount namespace."""


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program.pack(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """An installed program, whose dependencies are those of the tests."""
    prefix = tmp_path_factory.mktemp("node") / "prefix"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", prefix], check=True)
    [packages] = prefix.glob("lib/python*/site-packages")
    [ours] = {str(distribution("typer").locate_file("."))}
    (packages / "dependencies.pth").write_text(f"{ours}\n")
    pip = [sys.executable, "-m", "pip", "--python", prefix / "bin/python"]
    pip += ["--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel], check=True
    )
    (prefix / "installed").touch()
    return prefix


@pytest.fixture
def on_a_node(tmp_path: Path, prefix: Path) -> list[str]:
    """A command's first words, with which it runs on a node of its own with a fake systemctl."""
    if not shutil.which("unshare") or os.geteuid() != 0:
        pytest.skip("only root can make a mount namespace")
    programs = tmp_path / "programs"
    programs.mkdir()
    systemctl = programs / "systemctl"
    systemctl.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n')
    systemctl.chmod(0o755)
    (tmp_path / "work").mkdir()
    folders = *NODE_FOLDERS, str(prefix.parent).strip("/")
    script = IN_A_NODE_OF_ITS_OWN.format(folders=" ".join(folders))
    command = [*OWN_MOUNTS, "env"]
    command += [f"PATH={programs}:{os.environ['PATH']}", "sh", "-euc", script, "sh"]
    return [*command, str(tmp_path / "work"), "sh", "-euc"]


def listing(folders: str = " ".join(f"/{name}" for name in NODE_FOLDERS)) -> str:
    return f"find {folders} -xdev | sort"


def test_a_wheel_of_the_running_program_has_all_of_it(wheel: Path) -> None:
    names = names_in(wheel)
    data = f"{wheel.name.partition('-py3')[0]}.data/data/share"
    assert {
        f"{data}/man/man1/ckptfs.1",
        f"{data}/bash-completion/completions/ckptfs",
        f"{data}/ckptfs/ckptfs.toml",
        *(
            f"{data}/ckptfs/systemd/{folder}/ckptfs.{kind}"
            for folder in ("system", "user")
            for kind in ("service", "socket")
        ),
        "ckptfs/py.typed",
    } <= names
    assert not [name for name in names if name.endswith(".pyc") or "direct_url" in name]
    files = distribution("ckptfs").files or []
    assert sum(not str(file).endswith(".pyc") for file in files) - len(names) <= 6


def test_an_installation_from_that_wheel_is_the_same(prefix: Path) -> None:
    [packages] = prefix.glob("lib/python*/site-packages")
    assert (packages / "ckptfs/SEMANTICS.md").is_file()
    said = subprocess.run(
        [prefix / "bin/ckptfs", "completion", "bash"], check=True, capture_output=True, text=True
    ).stdout
    assert said == (prefix / "share/bash-completion/completions/ckptfs").read_text()


def test_what_is_made_is_removed(on_a_node: list[str], prefix: Path, tmp_path: Path) -> None:
    ckptfs = f"{prefix}/bin/ckptfs"
    script = f"""
    {listing()} >{tmp_path}/before
    {ckptfs} install-node --prefix {prefix}
    {listing()} >{tmp_path}/installed
    {ckptfs} install-node --prefix {prefix}
    {listing()} >{tmp_path}/again
    grep ExecStart /usr/local/lib/systemd/system/ckptfs.service >{tmp_path}/unit
    /usr/local/bin/ckptfs completion fish >/dev/null
    readlink -e /sbin/mount.fuse.ckptfs /usr/local/share/man/man1/ckptfs-attach.1 >/dev/null
    cp /etc/ckptfs.toml {tmp_path}/config
    /usr/local/bin/ckptfs install-node --uninstall --prefix {prefix}
    {listing()} >{tmp_path}/after
    ls {prefix.parent} >{tmp_path}/beside
    """
    subprocess.run([*on_a_node, script], check=True, timeout=120)
    made = {
        line
        for line in (tmp_path / "installed").read_text().splitlines()
        if line not in (tmp_path / "before").read_text().splitlines()
    }
    assert {
        "/etc/ckptfs.toml",
        "/usr/local/bin/ckptfs",
        "/usr/local/lib/systemd/user/ckptfs.socket",
        "/usr/local/share/man/man7/ckptfs-semantics.7",
        "/usr/local/share/bash-completion/completions/ckptfs",
        "/usr/local/share/zsh/site-functions/_ckptfs",
        "/usr/local/share/fish/vendor_completions.d/ckptfs.fish",
    } <= made
    assert (tmp_path / "again").read_text() == (tmp_path / "installed").read_text()
    assert (tmp_path / "after").read_text() == (tmp_path / "before").read_text()
    assert (tmp_path / "unit").read_text() == (
        f"ExecStart={prefix}/bin/python -m ckptfs._keeper.keeper\n"
    )
    assert "allow_other = true" in (tmp_path / "config").read_text()
    assert (tmp_path / "beside").read_text() == ""
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0] == "enable --quiet ckptfs.socket"
    assert "disable --quiet ckptfs.socket ckptfs.service" in asked


def test_a_changed_configuration_stays(on_a_node: list[str], prefix: Path, tmp_path: Path) -> None:
    script = f"""
    {prefix}/bin/ckptfs install-node --prefix {prefix}
    echo 'idle_exit_s = 0' >>/etc/ckptfs.toml
    {prefix}/bin/ckptfs install-node --uninstall --prefix {prefix} >{tmp_path}/said
    cp /etc/ckptfs.toml {tmp_path}/config
    """
    subprocess.run([*on_a_node, script], check=True, timeout=120)
    assert "kept /etc/ckptfs.toml, because it was changed" in (tmp_path / "said").read_text()
    assert "idle_exit_s = 0" in (tmp_path / "config").read_text()


def test_links_to_what_a_version_lacks_are_removed(
    on_a_node: list[str], prefix: Path, tmp_path: Path
) -> None:
    script = f"""
    {prefix}/bin/ckptfs install-node --prefix {prefix}
    rm {prefix}/share/man/man1/ckptfs-top.1
    {prefix}/bin/ckptfs install-node --prefix {prefix}
    ls /usr/local/share/man/man1 >{tmp_path}/pages
    """
    subprocess.run([*on_a_node, script], check=True, timeout=120)
    pages = (tmp_path / "pages").read_text().split()
    assert "ckptfs-attach.1" in pages
    assert "ckptfs-top.1" not in pages
    assert "ckptfs-top.1" not in (prefix / "installed").read_text()


@pytest.mark.parametrize(
    "existing",
    ["echo x >/usr/local/bin/ckptfs", "ln -s /bin/true /usr/local/bin/ckptfs"],
    ids=["file", "link"],
)
def test_what_others_have_made_stays(on_a_node: list[str], prefix: Path, existing: str) -> None:
    script = f"{existing}; {prefix}/bin/ckptfs install-node --prefix {prefix}"
    done = subprocess.run([*on_a_node, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "/usr/local/bin/ckptfs exists, and ckptfs has not made it" in done.stderr


def test_a_unit_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    record = Record(tmp_path, dry_run=False)
    record.begin()
    (tmp_path / "unit").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InstallError, match="is a link that ckptfs has not made"):
        record.write(tmp_path / "unit", "x")
    assert not (tmp_path / "elsewhere").exists()


def test_an_existing_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/true")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(node, "_require_roots", lambda _: None)
    with pytest.raises(InstallError, match="install-node has not made it"):
        node.install(tmp_path, "", sys.executable, dry_run=False)
    with pytest.raises(InstallError, match="holds no ckptfs"):
        node.uninstall(tmp_path, dry_run=False)
    for prefix in ("/", "relative"):
        with pytest.raises(InstallError, match="absolute path"):
            node.install(Path(prefix), "", sys.executable, dry_run=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "what", ["/nonexistent", "./none.whl", "ckptfs-1-py3-none-any.whl[daemon]"]
)
def test_a_source_that_does_not_exist_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/true")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(node, "_require_roots", lambda _: None)
    prefix = tmp_path / "prefix"
    for dry_run in (True, False):
        with pytest.raises(InstallError, match=r"does not exist; name a wheel of ckptfs"):
            node.install(prefix, what, sys.executable, dry_run)
    assert not prefix.exists()


def test_other_requirements_of_pip_are_no_paths() -> None:
    for what in ("", "ckptfs", "ckptfs[daemon]==0.1.0", "ckptfs @ file:///x/ckptfs-1.whl"):
        program.check_source(what)


def _give_away(prefix: Path) -> None:
    os.chown(prefix, OTHER, OTHER)


def _give_the_list_away(prefix: Path) -> None:
    os.chown(prefix / "installed", OTHER, OTHER)


def _give_its_folder_away(prefix: Path) -> None:
    os.chown(prefix.parent, OTHER, OTHER)


def _open_its_folder(prefix: Path) -> None:
    prefix.parent.chmod(0o777)


def _put_another_there(prefix: Path) -> None:
    """In a folder where everybody may do so."""
    prefix.parent.chmod(0o1777)
    prefix.rename(prefix.with_name("other"))
    prefix.symlink_to(prefix.with_name("other"))
    os.chown(prefix, OTHER, OTHER, follow_symlinks=False)


def _lead_into_an_open_folder(prefix: Path) -> None:
    _open_its_folder(prefix.rename(prefix.parent / "open" / "prefix"))
    prefix.symlink_to(prefix.parent / "open" / "prefix")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
@pytest.mark.parametrize(
    "weaken",
    [
        *(_give_away, _give_the_list_away, _give_its_folder_away, _open_its_folder),
        *(_put_another_there, _lead_into_an_open_folder),
    ],
)
def test_root_runs_and_removes_nothing_that_others_can_have_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weaken: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/true")
    monkeypatch.setattr(Record, "run", lambda *_: pytest.fail("a command was run"))
    prefix = tmp_path / "folder" / "prefix"
    prefix.mkdir(parents=True)
    (prefix.parent / "open").mkdir()
    victim = tmp_path / "victim"
    victim.touch()
    (prefix / "installed").write_text(f"{victim}\n")
    node._require_roots(prefix)
    weaken(prefix)
    with pytest.raises(InstallError, match="and root would run what they put there"):
        node.install(prefix, "", sys.executable, dry_run=False)
    with pytest.raises(InstallError, match="and root would run what they put there"):
        node.uninstall(prefix, dry_run=False)
    assert victim.exists()


def test_a_disk_for_the_cache_and_a_foreign_configuration_are_no_hindrance(
    on_a_node: list[str], prefix: Path, tmp_path: Path
) -> None:
    """The removal empties a file system mounted at the cache's place, and then continues."""
    script = f"""
    {prefix}/bin/ckptfs install-node --prefix {prefix}
    printf '# caf\\351\\n' >>/etc/ckptfs.toml
    mount -t tmpfs tmpfs /var/cache
    mkdir /var/cache/ckptfs; mount -t tmpfs tmpfs /var/cache/ckptfs
    mkdir /var/cache/ckptfs/objects; touch /var/cache/ckptfs/objects/x /var/cache/ckptfs/.y
    {prefix}/bin/ckptfs install-node --uninstall --prefix {prefix} >{tmp_path}/said
    ls -A /var/cache/ckptfs >{tmp_path}/cached
    """
    subprocess.run([*on_a_node, script], check=True, timeout=120)
    assert (tmp_path / "cached").read_text() == ""
    said = (tmp_path / "said").read_text()
    assert "kept /etc/ckptfs.toml, because it was changed" in said
    assert "removed ckptfs" in said


def test_missing_packages_are_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*command: str | Path) -> None:
        raise InstallError("failed")

    record = Record(tmp_path, dry_run=False)
    with pytest.raises(InstallError, match=r"is not a Python >= 3\.10"):
        program.install(record, "", "/bin/false")
    monkeypatch.setattr(record, "run", fail)
    with pytest.raises(InstallError, match=r"^failed$"):
        program._build_pyfuse3(record, sys.executable, "pip")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(program, "_has_fuse_header", lambda: False)
    with pytest.raises(InstallError, match="missing: fuse3; on Debian"):
        program.install(record, "", sys.executable)
    with pytest.raises(InstallError, match="apt-get install gcc pkg-config libfuse3-dev"):
        program._build_pyfuse3(record, sys.executable, "pip")


def test_what_a_dry_run_shows(tmp_path: Path) -> None:
    if not shutil.which("systemctl"):
        pytest.skip("there is no systemctl")
    prefix = tmp_path / "prefix"
    done = subprocess.run(
        [CKPTFS, "install-node", "--dry-run", "--prefix", prefix],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert f"-m venv {prefix}" in done.stdout
    assert f"--prefer-binary --find-links {prefix}/wheels" in done.stdout
    for path in ("/sbin/mount.fuse.ckptfs", "/usr/local/lib/systemd/user/ckptfs.socket"):
        assert path in done.stdout
    assert "systemctl enable --quiet ckptfs.socket" in done.stdout
    assert done.stdout.endswith("install-node: this was a dry run, which changed nothing\n")
    assert not prefix.exists()
    assert not Path("/usr/local/lib/systemd/user/ckptfs.socket").exists()
