"""A daemon that is started on demand belongs to no job: not to its cgroup, and not by what it has
inherited. Clients in other jobs are told where that cannot be had."""

import contextlib
import os
import signal
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import COMMAND_TIMEOUT_S, Node, daemons, parent_of, wait_until, workers
from support.worlds import OWN_MOUNTS

import ckptfs
from ckptfs._client import client
from ckptfs._keeper.background import _hierarchies

pytestmark = [
    pytest.mark.mount,
    # Python 3.12 warns because pyarrow has threads; they hold nothing that the children need.
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]

UriOf = Callable[[Path], str]
CKPTFS = str(Path(sys.executable).with_name("ckptfs"))
ALICE = 65533


def hierarchy(name: str) -> Path:
    """Where a hierarchy of cgroups is; "": v2. Skips where the machine has none for us."""
    for top in _hierarchies({name}, is_v2=not name):
        if os.access(top, os.W_OK):
            return Path(top)
    pytest.skip(f"no hierarchy {name or 'v2'} of cgroups can be written here")


@contextlib.contextmanager
def cgroup(name: str, below: str = "") -> Iterator[Path]:
    """A cgroup, for which `below` adds further levels. Its processes are killed at the end."""
    top = hierarchy(name) / f"ckptfs-slurm-{uuid.uuid4().hex[:8]}"
    inner = top / below
    inner.mkdir(parents=True)
    try:
        yield inner
    finally:
        kill_all(inner)
        while inner != top.parent:
            inner.rmdir()
            inner = inner.parent


def processes_in(group: Path) -> set[int]:
    return {int(pid) for pid in (group / "cgroup.procs").read_text().split()}


def kill_all(group: Path) -> None:
    """As a scheduler does at the end of a job."""
    for pid in processes_in(group):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not processes_in(group))


def in_group(group: Path, *command: str) -> list[str]:
    """The words of a command that runs in that cgroup."""
    return ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", *command]


def keeper_of(node: Node) -> int:
    with client.connect() as connection:
        return connection.keeper_pid


# -- the cgroup


@pytest.mark.parametrize("name", ["freezer", "name=systemd", ""])
def test_a_reader_outlives_the_job_that_started_the_daemon(
    name: str, node: Node, small: Path, uri_of: UriOf
) -> None:
    uri = uri_of(small)
    content = (small / "layers/0/weights.bin").read_bytes()
    with cgroup(name) as group:
        first = subprocess.Popen(
            in_group(group, sys.executable, "-c", HOLD, uri), stdout=subprocess.PIPE, text=True
        )
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with ckptfs.Checkpoint(uri).as_directory(mode="mount") as path:
            with open(f"{path}/layers/0/weights.bin", "rb", buffering=0) as file:
                assert file.read(1000) == content[:1000]
                kept = daemons()
                assert kept & processes_in(group) == set()
                assert first.pid in processes_in(group)
                kill_all(group)
                first.wait()
                assert daemons() == kept
                assert file.readall() == content[1000:]
            assert Path(path, "config.json").read_text() == '{"layers": 1}'
        first.stdout.close()


HOLD = """
import ckptfs, sys, time
with ckptfs.Checkpoint(sys.argv[1]).as_directory(mode="mount") as path:
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_daemon_may_be_told_to_stay_in_its_job(
    node: Node, small: Path, uri_of: UriOf, capfd: pytest.CaptureFixture[str]
) -> None:
    """Then clients in other jobs are told, and those in the same one are not; when the job has
    ended, the next attach begins anew."""
    uri = uri_of(small)
    node.configure(leave_job=False, linger_s=60.0)
    attach = [sys.executable, "-W", "error", "-c", ATTACH, uri]
    with cgroup("freezer", "uid_0/job_7/step_0") as group:
        node.run(*in_group(group, CKPTFS, "mount"))
        keeper = keeper_of(node)
        assert daemons() <= processes_in(group)
        assert "running inside Slurm job 7, and ending with it" in node.log()
        node.run(*in_group(group, *attach))
        with (
            pytest.warns(
                UserWarning, match="runs inside Slurm job 7, and its mount ends with"
            ) as told,
            ckptfs.Checkpoint(uri).as_directory(mode="mount"),
        ):
            pass
        assert "; ckptfs help jobs shows" in str(told[0].message)
        with warnings.catch_warnings():  # once is enough
            warnings.simplefilter("error")
            with ckptfs.Checkpoint(uri).as_directory(mode="mount") as path:
                kill_all(group)
                with pytest.raises(OSError, match=r"not connected|aborted"):
                    Path(path, "config.json").read_bytes()
        done = node.run(CKPTFS, "attach", uri)
        assert Path(done.stdout.strip(), "config.json").read_text() == '{"layers": 1}'
        assert keeper_of(node) != keeper


ATTACH = """
import ckptfs, sys
with ckptfs.Checkpoint(sys.argv[1]).as_directory(mode="mount") as path:
    open(path + "/config.json").read()
"""


def test_doctor_says_whether_the_daemon_ends_with_a_job(node: Node) -> None:
    def line(*words: str) -> str:
        report = node.run(*words, CKPTFS, "doctor", check=False).stdout
        [found] = [line for line in report.splitlines() if "daemon-job" in line]
        return found

    with cgroup("freezer", "uid_0/job_7") as group:
        inside = in_group(group)
        assert "belongs to no job" in line()
        assert "leaves Slurm job 7" in line(*inside)
        node.configure(leave_job=False)
        assert "ends with Slurm job 7" in line(*inside)
        assert "leave_job = true" in line(*inside)
        node.run(*inside, CKPTFS, "mount")
        assert "the daemon runs inside Slurm job 7, and ends with it" in line()
        assert "see ckptfs help jobs" in line()
        node.end()
        node.configure()
        node.run(*inside, CKPTFS, "mount")
        assert "the daemon runs inside no job" in line()


def test_a_private_daemon_stays_in_its_job(node: Node, small: Path) -> None:
    with cgroup("freezer") as group:
        command = in_group(group, sys.executable, "-c", PRIVATE, str(small))
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "held\n"
        [keeper] = daemons(b"--private")
        assert keeper in processes_in(group)
        process.communicate()
        assert process.returncode == 0
        wait_until(lambda: not daemons(b"--private"))


PRIVATE = """
import sys, ckptfs
from ckptfs._client import connection, private_daemon
from pyarrow import fs
import pickle
with private_daemon.leased(pickle.dumps(fs.LocalFileSystem()), sys.argv[1], (), None) as path:
    print("held", flush=True)
    sys.stdin.read()
for socket in private_daemon.sockets.values():
    connection.connect_to(socket, 30).stop(force=True)
"""


# -- what it has inherited


def test_keeper_daemon_and_workers_have_nothing_of_a_job(
    node: Node, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "RANK", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "AWS_PROFILE"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("TMPDIR", str(small))
    command = [
        *("taskset", "-c", str(min(os.sched_getaffinity(0))), "nice", "-n", "7"),
        *("prlimit", f"--fsize={1 << 30}:", "sh", "-c"),
        f"umask 077; trap '' HUP CHLD USR1; exec {CKPTFS} attach file://{small}",
    ]
    path = node.run(*command, cwd=str(small)).stdout.strip()
    assert Path(path, "config.json").read_text() == '{"layers": 1}'
    keeper = keeper_of(node)
    daemon = node.status()["pid"]
    [worker, *_] = [pid for pid in workers_of(daemon)]
    for pid in (keeper, daemon, worker):
        proc = Path(f"/proc/{pid}")
        names = {line.partition(b"=")[0] for line in (proc / "environ").read_bytes().split(b"\0")}
        assert names & {b"SLURM_JOB_ID", b"RANK", b"OMP_NUM_THREADS", b"TMPDIR"} == set()
        assert names & {b"CUDA_VISIBLE_DEVICES", b"AWS_PROFILE"} == set()
        assert names >= {b"CKPTFS_SOCKET", b"CKPTFS_CONFIG", b"PATH"}
        assert os.sched_getaffinity(pid) == os.sched_getaffinity(0)
        assert os.getpriority(os.PRIO_PROCESS, pid) == 0
        assert os.readlink(proc / "cwd") == "/"
        status = (proc / "status").read_text().splitlines()
        fields = dict(line.split(":\t", 1) for line in status if ":\t" in line)
        assert fields["Umask"] == "0022"
        assert int(fields["SigBlk"], 16) == 0
        ignored = {n for n in range(1, 65) if int(fields["SigIgn"], 16) >> (n - 1) & 1}
        assert ignored & {signal.SIGCHLD, signal.SIGUSR1} == set()
        session, tty = (proc / "stat").read_text().rpartition(") ")[2].split()[3:5]
        assert (int(session), int(tty)) == (keeper, 0)
        limits = (proc / "limits").read_text().splitlines()
        soft, hard = next(line.split()[-3:-1] for line in limits if "Max file size" in line)
        assert soft == hard


def workers_of(daemon: int) -> list[int]:
    wait_until(lambda: any(parent_of(pid) == daemon for pid in workers()))
    return [pid for pid in workers() if parent_of(pid) == daemon]


# -- allow_other without systemd


def test_other_users_reach_a_daemon_that_no_systemd_has_started(
    node: Node, small: Path, uri_of: UriOf
) -> None:
    """With root's own paths, made by a root whose umask is for itself; an earlier daemon for root
    alone has made the directory."""
    script = 'mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /var/cache; umask 077; exec "$@"'
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CKPTFS_")}
    done = subprocess.run(
        [
            *(*OWN_MOUNTS, "sh", "-ec", script, "sh"),
            *(sys.executable, "-c", OTHERS, CKPTFS, uri_of(small), str(ALICE)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    denied, content = done.stdout.splitlines()
    assert denied.endswith("(said by root's daemon at /run/ckptfs/control.sock)")
    assert content == '{"layers": 1}'


OTHERS = """
import os, subprocess, sys, tempfile, traceback
import ckptfs, ckptfs._client.client
import ckptfs._store.portable
from ckptfs._model.location import Location
from ckptfs._model.protocol.requests import Attach
program, uri, uid = sys.argv[1:]

def run(*words):
    subprocess.run([program, *words], check=True, stdout=subprocess.DEVNULL)

run("mount")
assert os.stat("/run/ckptfs").st_mode & 0o777 == 0o700
run("umount")
run("mount", "--allow-other")
assert os.stat("/run/ckptfs").st_mode & 0o777 == 0o755

def as_other_user():
    os.setgroups([])
    os.setresgid(int(uid), int(uid), int(uid))
    os.setresuid(int(uid), int(uid), int(uid))
    os.environ["HOME"] = "/nonexistent"
    with ckptfs._client.client.connect() as connection:
        try:
            connection.ask_once(Attach(location=Location("local", "/root")))
        except ckptfs.AccessDenied as error:
            print(error, flush=True)
    with ckptfs.Checkpoint(uri).as_directory(mode="mount") as path:
        assert path.startswith("/run/ckptfs/mnt/"), path
        print(open(path + "/config.json").read(), flush=True)

try:
    with ckptfs.Checkpoint(uri).as_directory(mode="mount"):
        pass  # so that all is imported, which may lie where only root can read
    child = os.fork()
    if not child:
        try:
            as_other_user()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
finally:
    run("umount", "--force")
"""
