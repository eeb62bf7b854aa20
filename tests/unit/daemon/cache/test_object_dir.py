"""A folder of the cache is taken only if it is whole in every respect."""

import os
from array import array
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import xxhash
from support.fakes import MIB, pattern

from ckptfs._daemon.cache import disk_ops, object_dir
from ckptfs._daemon.cache.object_dir import FORMAT, About, ObjectKey, Origin

KEY = ObjectKey("store", "bucket/a/model", 3 * MIB + 5, 7)
ORIGIN = Origin("run-0123456789ab", "s3://bucket/run", "bucket/run", 5 << 20, 0)
ABOUT = About(FORMAT, KEY, '"etag"', True, ORIGIN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / KEY.digest()


def test_a_folder_can_be_opened_again(folder: Path) -> None:
    files = object_dir.create(folder, ABOUT)
    object_dir.write_sums(files, 1, array("Q", [11, 12]))
    files.close()
    files, about, sums = object_dir.open_existing(folder, KEY)
    assert about == ABOUT
    assert list(sums) == [0, 11, 12, 0]
    assert os.fstat(files.data).st_size == KEY.size
    files.close()


def test_create_replaces_what_was_there(folder: Path) -> None:
    files = object_dir.create(folder, ABOUT)
    object_dir.write_sums(files, 0, array("Q", [1]))
    files.close()
    object_dir.create(folder, ABOUT).close()
    files, _, sums = object_dir.open_existing(folder, KEY)
    files.close()
    assert not any(sums)


def test_a_failed_create_leaves_no_descriptor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_files = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(object_dir, "write_about", _raise_no_space)
    with pytest.raises(OSError, match="no space"):
        object_dir.create(folder, ABOUT)
    assert set(os.listdir("/proc/self/fd")) == open_files


def _raise_no_space(*_: object) -> None:
    raise OSError("no space")


def _truncated(name: str, length: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, length)


def _overwritten(name: str, offset: int, data: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage


def _appended(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(b"x")

    return damage


def _described(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        fields = msgspec.to_builtins(ABOUT) | changes
        body = msgspec.json.encode(fields)
        envelope = {"about": msgspec.Raw(body), "xxh3": f"{xxhash.xxh3_64_intdigest(body):016x}"}
        (folder / "about.json").write_bytes(msgspec.json.encode(envelope))

    return damage


def _symlink(folder: Path) -> None:
    (folder / "data").rename(folder / "elsewhere")
    (folder / "data").symlink_to(folder / "elsewhere")


OTHER_KEY = msgspec.to_builtins(ObjectKey("store", "other", KEY.size, 7))
DAMAGES: dict[str, Callable[[Path], None]] = {
    "short data": _truncated("data", KEY.size - 1),
    "long data": _truncated("data", KEY.size + 1),
    "short map": _truncated("map", 24 + 8 * 4 - 1),
    "long map": _appended("map"),
    "empty map": _truncated("map", 0),
    "magic": _overwritten("map", 0, b"X"),
    "size in the map": _overwritten("map", 8, b"\xff"),
    "block size in the map": _overwritten("map", 16, b"\xff"),
    "no data": lambda folder: (folder / "data").unlink(),
    "no map": lambda folder: (folder / "map").unlink(),
    "no description": lambda folder: (folder / "about.json").unlink(),
    "empty description": _truncated("about.json", 0),
    "torn description": _truncated("about.json", 20),
    "binary description": _overwritten("about.json", 2, b"\xff\xfe"),
    "another format": _described(format=FORMAT + 1),
    "another object": _described(key=OTHER_KEY),
    "unknown field": _described(more=1),
    "wrong type": _described(etag=5),
    "a link": _symlink,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found(folder: Path, damage: Callable[[Path], None]) -> None:
    object_dir.create(folder, ABOUT).close()
    damage(folder)
    open_files = set(os.listdir("/proc/self/fd"))
    with pytest.raises((OSError, ValueError)):
        object_dir.open_existing(folder, KEY)
    assert set(os.listdir("/proc/self/fd")) == open_files


def test_a_folder_of_another_object_is_refused(folder: Path) -> None:
    object_dir.create(folder, ABOUT).close()
    with pytest.raises(ValueError, match="another object"):
        object_dir.open_existing(folder, ObjectKey("store", "bucket/a/model", KEY.size, 8))


def test_a_description_is_replaced_whole(folder: Path) -> None:
    object_dir.create(folder, ABOUT).close()
    other = msgspec.structs.replace(ABOUT, etag='"a much longer etag than before"')
    object_dir.write_about(folder, other)
    assert object_dir.read_about(folder) == other
    assert not (folder / "about.partial").exists()


def test_each_block_has_its_checksum() -> None:
    data = memoryview(pattern(2 * MIB + 1))
    parts = [data[:MIB], data[MIB : 2 * MIB], data[2 * MIB :]]
    sums = [object_dir.checksum(ABOUT, index, part) for index, part in enumerate(parts, 5)]
    assert list(object_dir.checksums(ABOUT, 5, data)) == sums
    assert len(set(sums)) == 3
    flipped = bytearray(parts[0])
    flipped[123456] ^= 1
    assert object_dir.checksum(ABOUT, 5, bytes(flipped)) != sums[0]


def test_a_checksum_is_of_one_place_in_one_version_of_one_object() -> None:
    data = pattern(MIB)
    others = [
        msgspec.structs.replace(ABOUT, etag='"another"'),
        msgspec.structs.replace(ABOUT, key=ObjectKey("store", "bucket/a/model", KEY.size, 8)),
    ]
    sums = [object_dir.checksum(about, 0, data) for about in (ABOUT, *others)]
    sums.append(object_dir.checksum(ABOUT, 1, data))
    assert len(set(sums)) == 4


def test_a_checksum_is_never_the_mark_of_an_absent_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_dir.xxhash, "xxh3_64_intdigest", lambda *_: 0)
    assert object_dir.checksum(ABOUT, 0, b"data") != 0


def test_punching_frees_the_space_and_keeps_the_rest(folder: Path) -> None:
    files = object_dir.create(folder, ABOUT)
    data = pattern(KEY.size)
    os.pwrite(files.data, data, 0)
    before = os.fstat(files.data).st_blocks
    disk_ops.punch(files.data, MIB, MIB)
    assert os.fstat(files.data).st_blocks * 512 <= before * 512 - MIB
    read = os.pread(files.data, KEY.size, 0)
    assert read == data[:MIB] + bytes(MIB) + data[2 * MIB :]
    files.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        disk_ops.punch(-1, 0, MIB)


@pytest.mark.parametrize("field", ["store", "path", "size", "mtime_ns"])
def test_the_digest_depends_on_every_field(field: str) -> None:
    value = getattr(KEY, field)
    other = msgspec.structs.replace(KEY, **{field: value * 2})
    assert other.digest() != KEY.digest()
    assert len(other.digest()) == 32
