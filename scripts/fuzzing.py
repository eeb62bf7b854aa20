"""Coverage-guided fuzzing (atheris, which is libFuzzer) of what ckptfs reads from others.

Each target is a parser of bytes that a client, a store or the disk gives. It must end with a result
or with the error it documents, within seconds and without much memory, whatever the bytes are.
libFuzzer prints its progress (executions, coverage, corpus) and, where it finds something, the
input, which belongs into a test then: it says where in `scripts/results/fuzz` it is.
"""

import argparse
import contextlib
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FOUND = Path(__file__).parent / "results" / "fuzz"
"""Where inputs go that a target does not stand, each under the target's name."""

RSS_MB_MAX = 1024
INPUT_S_MAX = 10
INPUT_BYTES_MAX = 1 << 16
WORDS = [
    *(rf"\"{word}\":" for word in ("op", "v", "location", "kind", "path", "options", "secrets")),
    *(rf"\"{word}\"" for word in ("attach", "detach", "stop", "s3", "local", "http", "azure")),
    *(rf"\"{word}\":" for word in ("dtype", "shape", "data_offsets", "etag", "settled", "key")),
    *(
        "null",
        "true",
        "1e999",
        "-1",
        "{}",
        "[]",
        r"\\ud800",
        r"\xff",
        "../",
        "//",
        r"\x00",
        r"\x01f",
    ),
    *("<Contents>", "</Contents>", "<Key>", "</Key>", "<Size>", "<!DOCTYPE", "<!ENTITY", "&amp;"),
    *(r"PK\x01\x02", r"PK\x05\x06", r"PK\x06\x06", r"\x8c\x0cstorage_data", r"\x80\x04"),
]
"""Inputs that libFuzzer would take long to find."""


def control() -> tuple[Callable[[bytes], None], Iterable[bytes]]:
    """Messages on the control socket, as the daemon decodes them."""
    from ckptfs._model.location import Location
    from ckptfs._model.plans.plan import Plan, Step
    from ckptfs._model.protocol import requests, wire
    from ckptfs._store.kinds import daemon_rights_for
    from ckptfs.errors import ProtocolError

    place = Location("s3", "bucket/run", {"region": "eu"}, {"access_key": "k"})
    seeds = [
        requests.Attach(location=place, prefetch=["*.json"], pinned=True),
        requests.Detach(name="x", location=place, force=True),
        requests.Status(),
        requests.MetadataChanged(location=place),
        requests.StartPrefetch(name="x", globs=["*"], rate=1),
        requests.PrefetchProgress(),
        requests.GiveBlocks(name="x", path="a/b", first=1, count=2),
        requests.FindBlocks(name="x", path="a/b"),
        requests.TakeBlocks(name="x", path="a/b", first=1, etag='"e"', sums=[1, 1 << 63]),
        requests.Attach(
            location=place,
            plan=Plan(uri="u", version="v", files=["a"], steps=[Step(0, "t", 1, 2, (3,))]),
        ),
        requests.GetTrace(location=place),
        requests.CollectCache(free=1),
        requests.VerifyCache(rate=1),
        requests.Stop(force=True),
    ]

    def run(data: bytes) -> None:
        try:
            request = wire.decode_request(data)
        except ProtocolError as error:
            str(error)
            return
        assert wire.decode_request(wire.encode(request)) == request
        location = getattr(request, "location", None)
        if location is not None:
            _ = (
                location.uri,
                location.name,
                location.digest,
                location.identity,
                daemon_rights_for(location),
            )
            assert "/" not in location.name and location.name not in (".", "..")

    return run, [wire.encode(seed) for seed in seeds]


def manifest() -> tuple[Callable[[bytes], None], Iterable[bytes]]:
    """Listings with hostile names, and the tree that is made of them."""
    from ckptfs._daemon.attachment.inodes import Tree
    from ckptfs._model.manifest import ListedFile, Listing, build_manifest

    def run(data: bytes) -> None:
        names = data.decode("utf-8", "surrogateescape").split("\x01")
        files = [ListedFile(name[1:], len(name), 0) for name in names if name[:1] != "d"]
        listing = Listing(files, [name[1:] for name in names if name[:1] == "d"])
        made = build_manifest(listing)
        tree = Tree(1, made, 5)
        for file in made.files:
            node = tree.root
            for part in file.path.encode().split(b"/"):
                assert part not in (b"", b".", b"..") and len(part) <= 255
                node = node.children[part]
            assert node.size == file.size and not node.is_directory
        assert len(made.files) + len(made.skipped) >= len(files) - len(made.directories)

    return run, [b"fa/b\x01fa/c\x01dd", b"f../x\x01fa\x01fa/b", b"f\xff\x01f//\x01f" + b"x" * 300]


class _Answers:
    """In place of an `S3Client`: its answer is always `data`."""

    answers_are_whole = False

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._left = 3  # pages

    def request(self, method: str, *_: Any, **__: Any) -> Any:
        from ckptfs._store.s3.client import S3Error

        self._left -= 1
        if method == "HEAD" or self._left < 0:
            raise S3Error(404, "", "")
        body = SimpleNamespace(read=lambda n: self._data[:n], length=0)
        return contextlib.nullcontext(body)


def listing() -> tuple[Callable[[bytes], None], Iterable[bytes]]:
    """The XML of S3's listings."""
    from ckptfs._model.manifest import build_manifest
    from ckptfs._store.s3.store import S3Store
    from ckptfs.errors import CkptfsError

    page = (
        b'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        b"<EncodingType>url</EncodingType><IsTruncated>true</IsTruncated>"
        b"<NextContinuationToken>t</NextContinuationToken><Contents><Key>run/a%20b</Key>"
        b"<LastModified>2026-01-02T03:04:05.678Z</LastModified><ETag>&quot;0a&quot;</ETag>"
        b"<Size>5</Size></Contents><Contents><Key>run/d/</Key><Size>0</Size></Contents>"
        b"</ListBucketResult>"
    )

    def run(data: bytes) -> None:
        client: Any = _Answers(data)
        try:
            found = S3Store(client, "run", "s3://b/run").list(1000)
        except CkptfsError as error:
            assert "\n" not in str(error)
            return
        build_manifest(found)

    return run, [page, page.replace(b"true", b"false"), b"<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>"]


def cache() -> tuple[Callable[[bytes], None], Iterable[bytes]]:
    """The description and the map of a cached object, as they lie on the disk."""
    import msgspec

    from ckptfs._daemon.cache import object_dir

    size = 3 << 20
    key = object_dir.ObjectKey("store", "path", size, 1)
    origin = object_dir.Origin("run-0123", "s3://b/run", "b/run", size, 0)
    about = object_dir.About(object_dir.FORMAT, key, '"e"', False, origin)
    folder = Path(tempfile.mkdtemp(), key.digest())
    object_dir.create(folder, about).close()
    whole = msgspec.json.encode(about)
    map_ = (folder / "map").read_bytes()

    def run(data: bytes) -> None:
        described, _, mapped = data.partition(b"\0\0\0\0|")
        (folder / "about.json").write_bytes(described)
        (folder / "map").write_bytes(mapped)
        try:
            files, found, sums = object_dir.open_existing(folder, key)
        except (OSError, ValueError):
            return
        files.close()
        assert (found.key, len(sums)) == (key, 3)

    return run, [whole + b"\0\0\0\0|" + map_, whole + b"\0\0\0\0|" + map_[:-1]]


def formats() -> tuple[Callable[[bytes], None], Iterable[bytes]]:
    """Headers of safetensors files, and central directories of zip archives."""
    from ckptfs._model.formats import headers

    def check(parts: Any, size: int) -> None:
        if parts is not None:
            ends = [0, *(at for pair in zip(parts.starts, parts.stops, strict=True) for at in pair)]
            assert ends == sorted(ends) and ends[-1] <= size

    def run(data: bytes) -> None:
        size = len(data) + 100_000
        if length := headers.safetensors_header_length(data[:9], len(data)):
            headers.safetensors_tensors(data[:length])
        headers.safetensors_tensors(data)
        check(headers.safetensors_parts(data, size), size)
        end = data[-headers.ZIP_END_BYTES :]
        where = headers.zip_directory_range(end, len(data))
        for entry in headers.zip_entries(data[where.start : where.stop], where.start):
            assert 0 <= entry.start <= entry.end <= where.start
        check(headers.zip_parts(data[where.start : where.stop], where.start), where.start)
        check(headers.zip_parts(data, size), size)

    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,70000]},"__metadata__":{}}'
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("a", bytes(20))
        made.writestr("b/c", b"x")
    entries = archive.getvalue()
    return run, [struct.pack("<Q", len(header)) + header, entries, entries[-150:-22]]


def dcp() -> tuple[Callable[[bytes], None], Iterable[bytes]]:
    """The pickle of torch.distributed.checkpoint."""
    from support.archives import pickle_metadata

    from ckptfs._model.formats import dcp

    items = [(f"layer.{i}", f"__{i}_0.distcp", i * 70_000, 70_000) for i in range(3)]

    def run(data: bytes) -> None:
        dcp.is_metadata(data[: dcp.HEAD_BYTES])
        for name, parts in dcp.parts_by_file(data, lambda _: 1 << 20, lambda: None).items():
            assert isinstance(name, bytes) and parts.stops[-1] <= 1 << 20
        for tensors in dcp.tensors_by_file(data, lambda _: 1 << 20, lambda: None).values():
            assert all(t.name and 0 <= t.start < t.end <= 1 << 20 for t in tensors)

    offsets = {0: (0, 0), 1: (5,), 2: (70_000, 1, 2)}
    return run, [pickle_metadata(items, protocol, offsets=offsets) for protocol in (2, 3, 4, 5)]


def metadata() -> tuple[Callable[[bytes], None], Iterable[bytes]]:
    """A checkpoint's ``.metadata.json`` and its attributes."""
    from ckptfs._daemon.fs.xattrs import shown_values
    from ckptfs._model import attributes as names
    from ckptfs._store import metadata as stored
    from ckptfs.errors import MetadataError

    def run(data: bytes) -> None:
        try:
            values = stored.parse(data, "s3://b/run")
        except MetadataError as error:
            assert "\n" not in str(error)
            return
        if isinstance(values, dict):
            shown, hidden = shown_values(values)
            assert len(shown) + len(hidden) == len(values)
            assert all(len(name.encode()) <= names.NAME_BYTES_MAX for name in shown)

    return run, [
        b'{"a": 1.5, "b": [null, true, {"c": "\\u00fc"}], "": 0}',
        b"[1]",
        b'{"\\ud800": NaN}',
    ]


def plan() -> tuple[Callable[[bytes], None], Iterable[bytes]]:
    """Plans, applied to a checkpoint, and the files that their tensors are looked for in."""
    from ckptfs._model.formats.headers import Tensor
    from ckptfs._model.formats.tensors import layout
    from ckptfs._model.plans import plan as plans
    from ckptfs.errors import PlanError

    step = plans.Step(0, "t", 1, 1 << 40, (3,))
    seed = plans.Plan(uri="u", version="v", files=["a1", "b"], steps=[step])

    def tensors_of(data: bytes) -> list[Tensor]:
        asking = layout(len(data))
        try:
            start, stop = next(asking)
            while True:
                assert 0 <= start < stop <= len(data)
                start, stop = asking.send(data[start:stop])
        except StopIteration as found:
            return found.value

    def run(data: bytes) -> None:
        tensors = tensors_of(data)
        try:
            found = plans.decode(data)
        except PlanError as error:
            str(error)
            found = seed
        matched = plans.match_files(found, {"a2": 7, "b": 8})
        sizes = {7: 1000, 8: 5}
        for piece in plans.pieces_of(found, -1, matched, sizes, {7: tensors}, 100):
            assert 0 <= piece.start < piece.stop <= sizes[piece.file]

    header = b'{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    return run, [plans.encode(seed), struct.pack("<Q", len(header)) + header + bytes(8)]


TARGETS = {
    target.__name__: target
    for target in (control, manifest, listing, cache, formats, dcp, metadata, plan)
}


def _fuzz(name: str, seconds: int, corpus: str, seed: int) -> None:
    """Run one target in this process. Never returns: libFuzzer ends it."""
    import atheris

    # The stubs lack this function.
    with atheris.instrument_imports(include=["ckptfs"]):  # pyright: ignore[reportAttributeAccessIssue]
        run, seeds = TARGETS[name]()
    for number, data in enumerate(seeds):
        Path(corpus, f"seed-{number}").write_bytes(data)
    words = Path(tempfile.mkdtemp(), "words")
    words.write_text("".join(f'"{word}"\n' for word in WORDS))
    options = [
        f"-dict={words}",
        f"-max_total_time={seconds}",
        f"-rss_limit_mb={RSS_MB_MAX}",
        f"-timeout={INPUT_S_MAX}",
        f"-max_len={INPUT_BYTES_MAX}",
        f"-seed={seed}",
        f"-artifact_prefix={FOUND / name}-",
        "-print_final_stats=1",
        "-verbosity=1",
    ]
    atheris.Setup([sys.argv[0], *options, corpus], run)
    atheris.Fuzz()


def main() -> None:
    """See ``scripts/fuzz --help``."""
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="of each target (60)")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers (1)")
    parser.add_argument("--corpus", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.targets) - TARGETS.keys()
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    if args.corpus:
        _fuzz(args.targets[0], args.seconds, args.corpus, args.seed)
    FOUND.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    for name in args.targets or TARGETS:
        with tempfile.TemporaryDirectory(prefix="ckptfs-fuzz-") as folder:
            began_s = time.monotonic()
            done = subprocess.run(
                [
                    *(sys.executable, __file__, name, "--corpus", folder),
                    *("--seconds", str(args.seconds), "--seed", str(args.seed)),
                ],
                env={**os.environ, "TMPDIR": folder},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
            )
            took_s = time.monotonic() - began_s
        executions = re.findall(r"stat::number_of_executed_units:\s*(\d+)", done.stdout)
        peak = re.findall(r"stat::peak_rss_mb:\s*(\d+)", done.stdout)
        covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", done.stdout)
        if done.returncode or not executions:
            failed.append(name)
            print(done.stdout[-6000:])
            for path in re.findall(r"Test unit written to (.+)", done.stdout):
                print(f"{name}: the input is {path}")
        edges, features, inputs = covered[-1] if covered else ("?", "?", "?")
        print(
            f"{name}: {'FAILED' if name in failed else 'clean'}, "
            f"{executions[-1] if executions else '?'} executions in {took_s:.0f} s, {edges} edges, "
            f"{features} features, {inputs} inputs kept, {peak[-1] if peak else '?'} MiB",
            flush=True,
        )
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
