"""No object name leads out of the mount or breaks it; what is left out is reported once."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs._model import manifest as manifest_module
from ckptfs._model.manifest import (
    METADATA_NAME,
    NAME_BYTES_MAX,
    ListedFile,
    Listing,
    Skipped,
    build_manifest,
    fault_of_name,
    printable,
)
from ckptfs.errors import LimitExceeded

HOSTILE = {
    "..": "'..'",
    "../up": "'..'",
    "a/../b": "'..'",
    "a/..": "'..'",
    ".": "'.'",
    "./a": "'.'",
    "a/./b": "'.'",
    "": "empty",
    "/etc/passwd": "empty",
    "a//b": "empty",
    "marker/": "empty",
    "nul\0byte": "NUL",
    "new\nline": "newline",
    "lone\udc80surrogate": "UTF-8",
    "\ud800": "UTF-8",
    "x" * 256: "255",
    "dir/" + "ü" * 128: "255",
}
GOOD = [
    "a",
    "...",
    "..hidden",
    "deep/er/file",
    " ",
    "\t",
    "back\\slash",
    "-rf",
    "x" * NAME_BYTES_MAX,
    "ü" * 127,
    "\u202e right to left",
]


def file(path: str, size: int = 1, mtime_ns: int = 1) -> ListedFile:
    return ListedFile(path, size, mtime_ns)


@pytest.mark.parametrize(("name", "reason"), HOSTILE.items(), ids=map(ascii, HOSTILE))
def test_a_hostile_name_is_reported_and_the_rest_survives(name: str, reason: str) -> None:
    manifest = build_manifest(Listing([*map(file, GOOD), file(name)], []))
    assert [f.path for f in manifest.files] == sorted(GOOD)
    [skipped] = manifest.skipped
    assert reason in skipped.reason
    assert skipped.name == printable(name)
    assert manifest.directories == ("deep", "deep/er")


def test_the_metadata_is_in_no_version() -> None:
    others = [file("a"), file("sub/.metadata.json")]
    versions = {
        build_manifest(Listing([*others, *metadata], [])).version
        for metadata in (
            [],
            [file(METADATA_NAME)],
            [file(METADATA_NAME, 2)],
            [file(METADATA_NAME, 1, 2)],
        )
    }
    assert len(versions) == 1
    changed = [file("a"), file("sub/.metadata.json", 2)]
    assert build_manifest(Listing(changed, [])).version not in versions
    assert build_manifest(Listing([*others, file(f"{METADATA_NAME}x")], [])).version not in versions
    assert METADATA_NAME in [
        f.path for f in build_manifest(Listing([file(METADATA_NAME)], [])).files
    ]


@pytest.mark.parametrize("name", HOSTILE, ids=map(ascii, HOSTILE))
def test_a_hostile_directory_is_not_shown(name: str) -> None:
    manifest = build_manifest(Listing([file("a")], [name, "good"]))
    assert manifest.directories == ("good",)
    assert len(manifest.files) == 1
    # "" is the checkpoint itself: its own marker object.
    assert [s.name for s in manifest.skipped] == ([printable(name)] if name else [])


def test_a_hostile_directory_is_reported_through_what_is_below_it() -> None:
    listing = Listing([file("a/../b/c")], ["a", "a/..", "a/../b", "x/..", "x/../y"])
    manifest = build_manifest(listing)
    assert [s.name for s in manifest.skipped] == ["a/../b/c", "x/../y"]
    assert manifest.directories == ("a",)


def test_a_name_that_is_both_is_shown_as_a_directory() -> None:
    manifest = build_manifest(Listing([file("a"), file("a/b"), file("c"), file("d")], ["d"]))
    assert [f.path for f in manifest.files] == ["a/b", "c"]
    assert manifest.directories == ("a", "d")
    assert sorted(s.name for s in manifest.skipped) == ["a", "d"]
    assert all("both" in s.reason for s in manifest.skipped)


def test_of_a_name_listed_twice_the_first_is_kept() -> None:
    manifest = build_manifest(Listing([file("a", 1), file("a", 2), file("b", 3)], []))
    assert [(f.path, f.size) for f in manifest.files] == [("a", 1), ("b", 3)]
    assert [s.name for s in manifest.skipped] == ["a"]
    assert manifest.size == 4


def test_what_the_store_skipped_is_passed_on() -> None:
    seen = Skipped("name", "a reason")
    assert build_manifest(Listing([file("..")], [], [seen])).skipped[0] == seen


def test_printable_is_one_short_line() -> None:
    for name in HOSTILE:
        shown = printable(name * 10)
        assert shown.isprintable()
        assert len(shown) <= 300
    assert printable("lone\udc80") == "lone\\udc80"
    assert printable("tab\tand\x1b[31m") == "tab\\tand\\x1b[31m"


_components = st.one_of(
    st.sampled_from(["a", "b", "c", "d", "..", ".", "", "é", "n\nl", "\0", "\udcff", "y" * 256]),
    st.text(max_size=3),
)
_paths = st.lists(_components, min_size=1, max_size=4).map("/".join)
_files = st.lists(st.builds(ListedFile, _paths, st.integers(0, 9), st.integers(0, 9)), max_size=12)


@given(_files, st.lists(_paths, max_size=5))
def test_every_file_is_kept_or_skipped_once_and_paths_are_safe(
    files: list[ListedFile], directories: list[str]
) -> None:
    manifest = build_manifest(Listing(files, directories))
    kept = [f.path for f in manifest.files]
    assert kept == sorted(set(kept))
    assert set(manifest.files) <= set(files)
    expected = Counter(printable(f.path) for f in files)
    reported = Counter([*map(printable, kept), *(s.name for s in manifest.skipped)])
    assert not expected - reported
    # Hostile directories with nothing below them are reported too.
    assert set(reported - expected) <= {printable(d) for d in directories if fault_of_name(d)}
    assert manifest.size == sum(f.size for f in manifest.files)
    assert list(manifest.directories) == sorted(set(manifest.directories))
    for path in (*kept, *manifest.directories):
        for component in path.encode().split(b"/"):
            assert component not in (b"", b".", b"..")
            assert b"\0" not in component
            assert b"\n" not in component
            assert len(component) <= 255
    assert not set(kept) & set(manifest.directories)
    present = {"", *manifest.directories}
    assert all(path.rpartition("/")[0] in present for path in (*kept, *manifest.directories))
    implied = {
        "/".join(parts[:count])
        for parts in (path.split("/") for path in kept)
        for count in range(1, len(parts))
    }
    good = {path for path in directories if fault_of_name(path) is None}
    assert implied | good <= set(manifest.directories)


@given(
    st.lists(
        st.builds(ListedFile, _paths, st.integers(0, 9), st.integers(0, 9)),
        unique_by=lambda f: f.path,
        max_size=10,
    ),
    st.randoms(use_true_random=False),
)
def test_the_version_does_not_depend_on_the_order(files: list[ListedFile], random: object) -> None:
    before = build_manifest(Listing(files, []))
    shuffled = files.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    after = build_manifest(Listing(shuffled, []))
    assert (before.version, before.files) == (after.version, after.files)
    assert before.directories == after.directories


def test_the_version_depends_on_every_path_size_and_time() -> None:
    listings = [
        [],
        [file("a")],
        [file("b")],
        [file("a", size=2)],
        [file("a", mtime_ns=2)],
        [file("a", 11, 2)],
        [file("a", 1, 12)],
        [file("a"), file("b")],
        [file("a"), file("b", size=2)],
    ]
    versions = [build_manifest(Listing(files, [])).version for files in listings]
    for first, second in itertools.combinations(versions, 2):
        assert first != second
    assert all(len(v) == 32 and set(v) <= set("0123456789abcdef") for v in versions)


def test_a_name_of_many_directories_is_left_out_or_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deep, deeper = "a/" * 2047 + "a", "a/" * 2048 + "a"
    manifest = build_manifest(Listing([ListedFile(name, 1, 0) for name in (deep, deeper)], []))
    assert [file.path for file in manifest.files] == [deep]
    assert [skipped.reason for skipped in manifest.skipped] == [
        "the name is longer than 4095 bytes"
    ]
    assert len(manifest.directories) == 2047
    assert manifest_module.DIRECTORIES_MAX == 1_000_000
    monkeypatch.setattr(manifest_module, "DIRECTORIES_MAX", 10_000)  # a million takes seconds
    many = [ListedFile(f"{i}/{deep[:-100]}", 1, 0) for i in range(6)]
    assert len(build_manifest(Listing(many[:5], [])).directories) < 10_000
    with pytest.raises(LimitExceeded, match="more than 10000 directories"):
        build_manifest(Listing(many, []))
