"""The case of a store that ends TLS itself: SeaweedFS."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from support.serverbase import Missing
from support.servers import SeaweedFS

from benchmark.cold import CPU_OF_DAEMON, read_large
from benchmark.contenders import CKPTFS, RAW, S3FS, why_not_installed
from benchmark.results import amount, ratio
from benchmark.stores import BUCKET, Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.serverbase import Authority

    from benchmark.run import Run


def seaweedfs(run: Run) -> None:
    """Cold sequential read of one large file from SeaweedFS, over its own TLS."""
    case = "seaweedfs"
    taken, cpu_s = read_large(run, case, run.seaweedfs, (RAW, CKPTFS, S3FS))
    raw, own = taken.get(RAW.name), taken.get(CKPTFS.name)
    run.report.goals += [
        ratio(case, "speed of ckptfs / raw", raw, own, at_least=0.8),
        amount(case, CPU_OF_DAEMON, "s", cpu_s, at_most=1.1),
    ]


@contextmanager
def seaweedfs_store(large: Path, authority: Authority) -> Iterator[Store]:
    """SeaweedFS with `large` as the file that the case reads.

    Raises:
        RuntimeError: SeaweedFS is not installed, or does not start.
    """
    try:
        server = SeaweedFS(authority)
        server.program()
    except Missing as missing:
        raise RuntimeError(f"SeaweedFS is {why_not_installed('seaweedfs')}") from missing
    with server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.upload_file(str(large), BUCKET, "large/data.bin")
        yield Store("SeaweedFS", server.tls_endpoint, str(authority.ca_file))
