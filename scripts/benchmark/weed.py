"""The case of a store that ends TLS itself: SeaweedFS."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from support.serverbase import Authority, Missing
from support.servers import SeaweedFS

from benchmark.cold import read_large, tls_goals
from benchmark.contenders import CKPTFS, RAW, S3FS, why_not_installed
from benchmark.run import calibrate
from benchmark.starting import OPEN_THREADS
from benchmark.stores import BUCKET, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmark.run import Run


def seaweedfs(run: Run) -> None:
    """Cold sequential read of one large file from SeaweedFS, over its own TLS."""
    case = "seaweedfs"
    taken: dict[str, list[float]] = {}
    cpu_s: list[float] = []
    try:
        # It runs for this case only, because it takes CPU time even without requests.
        with seaweedfs_store(run) as store:
            run.raw_threads[store.name] = calibrate(store, run.large(), OPEN_THREADS)
            taken, cpu_s = read_large(run, case, store, (RAW, CKPTFS, S3FS), 3)
    except MissingStore as missing:
        run.report.absent[f"the store of {case}"] = str(missing)
    run.report.goals += tls_goals(case, taken, cpu_s)


class MissingStore(Exception):
    """SeaweedFS is not installed, or does not start."""


@contextmanager
def seaweedfs_store(run: Run) -> Iterator[Store]:
    """SeaweedFS with the run's large file, over HTTPS.

    Raises:
        MissingStore: It is not installed, or does not start.
    """
    with seaweedfs_server(run) as (server, ca_file):
        large = run.objects.folder / "large" / "data.bin"
        server.client().upload_file(str(large), BUCKET, "large/data.bin")
        yield Store("SeaweedFS", server.tls_endpoint, ca_file)


@contextmanager
def seaweedfs_server(run: Run) -> Iterator[tuple[SeaweedFS, str]]:
    """SeaweedFS with an empty bucket, and the file of the authority that its clients trust.

    Raises:
        MissingStore: It is not installed, or does not start.
    """
    with ExitStack() as stack:
        temp = stack.enter_context(TemporaryDirectory(prefix="seaweedfs-", dir=run.temp))
        authority = Authority(Path(temp))
        try:
            server = stack.enter_context(SeaweedFS(authority))
        except Missing as missing:
            raise MissingStore(f"SeaweedFS is {why_not_installed('seaweedfs')}") from missing
        except RuntimeError as error:
            raise MissingStore(" ".join(str(error).split())) from error
        server.client().create_bucket(Bucket=BUCKET)
        yield server, str(authority.ca_file)
