"""Which job a process belongs to, and what a daemon that is started on demand takes from it."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckptfs._client import start
from ckptfs._keeper import background
from ckptfs._model.config import Config
from ckptfs._model.named_store import CredentialSource, StoreTable
from ckptfs._os import mountinfo
from ckptfs._os.jobs import job_in, job_of
from ckptfs.errors import ConfigError, DaemonError


@pytest.mark.parametrize(
    ("cgroups", "job"),
    [
        ("0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n", "Slurm job 7"),
        ("0::/system.slice/node1_slurmstepd.scope/job_71/step_batch/user/task_0", "Slurm job 71"),
        ("0::/../../slurmstepd.scope/job_7", "Slurm job 7"),
        ("4:memory:/\n6:freezer:/slurm/uid_1000/job_8/step_extern\n1:cpu:/", "Slurm job 8"),
        ("6:freezer:/slurm_node1/uid_1000/job_9/step_0/task_0", "Slurm job 9"),
        ("3:cpuset:/pbs_jobs.service/jobid/12345.server", "PBS job 12345.server"),
        ("0::/pbs_jobs.service/jobs/12345[3].server", "PBS job 12345[3].server"),
        ("6:freezer:/lsf/cluster1/job.55.1234.1700000000", "LSF job 55"),
        ("0::/user.slice/user-1000.slice/session-3.scope", ""),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/job_7.scope", ""),
        ("0::/system.slice/slurmd.service\n", ""),
        ("0::/\n", ""),
        ("", ""),
    ],
)
def test_a_job_is_known_by_its_cgroup(cgroups: str, job: str) -> None:
    assert job_in(cgroups) == job


def test_a_process_out_of_sight_has_no_job() -> None:
    assert job_of(0) == job_of(-1) == job_of(2**30) == ""
    assert job_of(os.getpid()) == job_in(Path("/proc/self/cgroup").read_text())


OF_A_JOB = {
    **{f"SLURM_{name}": "7" for name in ("JOB_ID", "PROCID", "TMPDIR", "CPU_BIND")},
    **{name: "0" for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")},
    **{name: "0" for name in ("CUDA_VISIBLE_DEVICES", "PBS_JOBID", "LSB_JOBID", "LD_PRELOAD")},
    **{name: "/job" for name in ("PWD", "OLDPWD", "VIRTUAL_ENV", "CONDA_PREFIX", "TMP", "TEMP")},
    **{name: "/job" for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "HF_HOME")},
    **{name: "x" for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")},
    **{name: "x" for name in ("HF_TOKEN", "AZURE_STORAGE_KEY", "WANDB_API_KEY", "AWS_REGION")},
    **{name: "x" for name in ("NOTIFY_SOCKET", "LISTEN_FDS", "JOURNAL_STREAM", "INVOCATION_ID")},
    **{name: "x" for name in ("DISPLAY", "SSH_AUTH_SOCK", "DBUS_SESSION_BUS_ADDRESS", "TERM")},
    "CKPTFS_MOUNT_FLAGS": "{}",
    "HTTPS_PROXY": "http://me:secret@proxy:1",
    "XDG_AWS_ACCESS_KEY_ID": "x",  # by the prefix of a named store
}
OF_ALL = {
    **{name: "/x" for name in ("PATH", "HOME", "LD_LIBRARY_PATH", "PYTHONPATH", "CLASSPATH")},
    **{name: "C.UTF-8" for name in ("LANG", "LC_ALL", "LC_CTYPE")},
    **{name: "/x" for name in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")},
    **{f"CKPTFS_{name}": "/x" for name in ("SOCKET", "MOUNT", "CACHE_DIR", "CONFIG")},
    **{name: "/x" for name in ("HADOOP_CONF_DIR", "JAVA_HOME", "KRB5CCNAME", "SSL_CERT_FILE")},
    "http_proxy": "http://proxy:1",
    "NO_PROXY": "localhost",
    "AWS_EC2_METADATA_DISABLED": "true",
    "TZ": "UTC",
}


def test_a_daemon_keeps_nothing_of_a_job() -> None:
    table = StoreTable(uri="s3://bucket", credentials=CredentialSource(environment="XDG_"))
    config = Config(socket="/s/sock", mount="/s/mnt", cache_dir="/c", store={"prod": table})
    environ = OF_A_JOB | OF_ALL | {"TMPDIR": "/tmp/job7"}
    assert start.kept_environment(environ, config) == OF_ALL


@pytest.mark.parametrize("field", ["socket", "mount", "cache_dir"])
def test_the_temporary_folder_is_kept_where_files_of_the_daemon_lie_in_it(field: str) -> None:
    paths = {"socket": "/s/sock", "mount": "/s/mnt", "cache_dir": "/c"}
    config = Config(**paths | {field: "/tmp/job7/ckptfs/x"})  # type: ignore[arg-type]
    environ = {"TMPDIR": "/tmp/job7", "HOME": "/h"}
    assert start.kept_environment(environ, config) == environ
    assert start.kept_environment({"TMPDIR": "/tmp/job"}, config) == {}  # a name that begins so
    assert start.kept_environment({"TMPDIR": ""}, config) == {}


# -- the scope


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a systemd whose user lingers; its folder has ``systemd-run``."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "systemd-run"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / "linger").mkdir()
    (tmp_path / "linger" / "root").touch()
    (tmp_path / "run" / "systemd").mkdir(parents=True)
    (tmp_path / "run" / "systemd" / "private").touch()
    monkeypatch.setattr(start, "has_systemd", lambda: True)
    monkeypatch.setattr(start, "_LINGERING", tmp_path / "linger")
    return tmp_path


def environ_of(systemd: Path) -> dict[str, str]:
    return {"PATH": f"{systemd}/bin:/usr/bin:/bin", "XDG_RUNTIME_DIR": f"{systemd}/run"}


def test_root_has_a_scope_of_the_system(systemd: Path) -> None:
    command = start.scope_command(environ_of(systemd))
    assert command[:2] == [f"{systemd}/bin/systemd-run", "--scope"]
    assert "--user" not in command


def test_a_user_who_lingers_has_a_scope(systemd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Root:
        pw_name = "root"

    monkeypatch.setattr(start.os, "geteuid", lambda: 1000)
    monkeypatch.setattr("pwd.getpwuid", lambda _: Root)
    command = start.scope_command(environ_of(systemd))
    assert command[:4] == [
        "env",
        f"XDG_RUNTIME_DIR={systemd}/run",
        f"{systemd}/bin/systemd-run",
        "--user",
    ]
    assert "--scope" in command
    (systemd / "linger" / "root").unlink()
    assert start.scope_command(environ_of(systemd)) == []
    (systemd / "linger" / "root").touch()
    (systemd / "run" / "systemd" / "private").unlink()
    assert start.scope_command(environ_of(systemd)) == []


def test_a_user_without_a_name_has_no_scope(systemd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.os, "geteuid", lambda: 123_456)
    assert start.scope_command(environ_of(systemd)) == []


def test_there_is_no_scope_without_systemd(systemd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start.scope_command({"PATH": "/nowhere"}) == []
    monkeypatch.setattr(start, "has_systemd", lambda: False)
    assert start.scope_command(environ_of(systemd)) == []


def test_keeper_whose_scope_fails_runs_without_it(tmp_path: Path) -> None:
    environment = {"CKPTFS_CONFIG": str(tmp_path / "gone"), "CKPTFS_SOCKET": str(tmp_path / "s")}
    with pytest.raises(ConfigError, match="gone: No such file"):  # so the keeper has run
        start.run_keeper(["--background"], environment, scope=["false"])
    with pytest.raises(DaemonError, match="the ckptfs daemon did not start"):
        start.run_keeper(["--unknown"], environment, scope=["false"])


# -- what a process gives back


def in_child(code: str, *, uid: int = 0) -> None:
    """Run `code` in a process with what a job may have given it. As `uid`, if it is not 0."""

    def as_in_a_job() -> None:
        os.umask(0o077)
        os.nice(7)
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        Path("/proc/self/oom_score_adj").write_text("300")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (1000, 2000))
        for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGTERM, signal.SIGALRM])

    # The user is changed when all is imported: the interpreter may be for root only.
    become = (
        f"os.setgroups([]); os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})"
    )
    before = "import os, resource, signal\nfrom ckptfs._keeper import background\n"
    middle = f"{become if uid else ''}\nbackground.reset_process()\n"
    subprocess.run(
        [sys.executable, "-c", before + middle + code], check=True, preexec_fn=as_in_a_job
    )


GIVEN_BACK = """
assert os.umask(0) == 0o022
status = open("/proc/self/status").read()
fields = dict(line.split(":\\t", 1) for line in status.splitlines() if ":\\t" in line)
assert int(fields["SigBlk"], 16) == 0, fields["SigBlk"]
# glibc keeps two signals for itself: posix_spawn ignores them, and no program can change them.
ignored = {n for n in signal.valid_signals() if int(fields["SigIgn"], 16) >> n - 1 & 1}
assert ignored <= {signal.SIGPIPE, signal.SIGXFSZ}, ignored
assert len(os.sched_getaffinity(0)) == os.cpu_count()
assert os.sched_getscheduler(0) == os.SCHED_OTHER
"""


def test_leaving_a_job_as_root_resets_all_limits() -> None:
    in_child(
        GIVEN_BACK
        + """
assert os.nice(0) == 0
assert open("/proc/self/oom_score_adj").read() == "0\\n"
may_raise = int(fields["CapEff"], 16) >> 24 & 1  # CAP_SYS_RESOURCE
for limit, hard in ((resource.RLIMIT_FSIZE, 1 << 30), (resource.RLIMIT_CPU, 2000)):
    most = resource.RLIM_INFINITY if may_raise else hard
    assert resource.getrlimit(limit) == (most, most)
"""
    )


def test_leaving_a_job_as_another_user_resets_the_allowed_limits() -> None:
    in_child(
        GIVEN_BACK
        + """
assert os.nice(0) == 7
assert resource.getrlimit(resource.RLIMIT_FSIZE) == (1 << 30, 1 << 30)
assert resource.getrlimit(resource.RLIMIT_CPU) == (2000, 2000)
""",
        uid=65533,
    )


def test_hierarchies_of_this_process_have_cgroup_procs() -> None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, _ = line.split(":", 2)
        for top in background._hierarchies({*controllers.split(",")}, is_v2=number == "0"):
            assert Path(top, "cgroup.procs").exists()
    assert background._hierarchies({"nonsense"}, is_v2=False) == []


def test_leaving_cgroups_on_a_kernel_without_cgroups_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_CGROUPS", tmp_path / "none")
    monkeypatch.setattr(mountinfo, "_TABLE", str(tmp_path / "none"))
    background.leave_cgroups()
    assert background._hierarchies({"freezer"}, is_v2=False) == []
