"""The list of attributes has those that copies can keep, and is the same each time."""

import os
import tempfile
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptfs._daemon.fs.xattrs import shown_values
from ckptfs._model import attributes as names
from ckptfs._model.attributes import LISTED_BYTES_MAX, kept_bytes, listed
from ckptfs._os.mountinfo import filesystem_type

_names = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=240
).map(lambda text: ("user.ckptfs." + text).encode()[:255].decode("utf-8", "ignore"))
_values = st.dictionaries(_names, st.binary(max_size=1200) | st.just(b"x" * 60_000), max_size=40)


@given(_values)
@example({})
@example({"user.ckptfs.empty": b""})
@example({f"user.ckptfs.meta.{'k' * 235}{n:03}": b"1" for n in range(100)})
@example({f"user.ckptfs.meta.{n}": b"1" for n in range(1000)})
@example({"user.ckptfs.big": b"x" * 2048, "user.ckptfs.small": b"x"})
def test_listed_attributes_are_the_first_that_fit(values: dict[str, bytes]) -> None:
    found = listed(values)
    assert found == listed(dict(values))
    assert found == [name for name in values if name in found]
    assert sum(kept_bytes(name, values[name]) for name in found) <= LISTED_BYTES_MAX
    left_bytes = LISTED_BYTES_MAX
    for name, value in values.items():
        if name in found:
            left_bytes -= kept_bytes(name, value)
        else:
            assert not value or kept_bytes(name, value) > left_bytes


_metadata = st.dictionaries(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).map(
        lambda text: text.encode()[:238].decode("utf-8", "ignore")
    )
    | st.integers(0, 999).map(lambda number: f"{'k' * 235}{number:03}"),
    st.none() | st.floats(allow_nan=False) | st.text(max_size=2100) | st.lists(st.integers()),
    max_size=300,
)


@settings(max_examples=60, deadline=None)
@given(_metadata, st.text(st.characters(codec="ascii", categories=["L"]), max_size=2100))
@example({f"{'k' * 235}{n:03}": n for n in range(300)}, "u" * 900)
@example({f"{n}": n for n in range(300)}, "")
@example({"x": "x" * 1990, "y": 1}, "")
def test_listed_attributes_leave_half_the_space_on_ext4(metadata: dict[str, Any], uri: str) -> None:
    stated = dict.fromkeys((names.URI, names.ORIGIN), uri.encode()) | {names.SIZE: b"1"}
    values = {**stated, **shown_values(metadata)[0]}
    with tempfile.NamedTemporaryFile() as file:
        if filesystem_type(file.name) != "ext4":
            pytest.skip("THE TEMPORARY FOLDER IS NOT ON EXT4: ITS LIMIT WAS NOT TESTED")
        for name in listed(values):
            os.setxattr(file.name, name, values[name])
        os.setxattr(file.name, "user.label", b"x" * 1900)
        kept = {name: os.getxattr(file.name, name) for name in listed(values)}
    assert kept.items() <= values.items()


def test_attribute_space_is_that_of_ext4() -> None:
    """Space of an attribute: struct ext4_xattr_entry has 16 bytes and the name without "user.",
    padded to a multiple of 4."""
    assert kept_bytes("user.a", b"1") == 16 + 4 + 4
    assert kept_bytes("user.abcd", b"12345") == 16 + 4 + 8
    assert kept_bytes("user.größe", b"") == 16 + 8
    assert kept_bytes("user." + "x" * 250, b"x" * 4000) == 16 + 252 + 4000


def test_listed_attributes_exclude_node_state_and_long_values() -> None:
    assert set(names.LISTED) < names.STATED
    of_this_node = {names.STATE, names.CACHED, names.ATTACHED, names.ERROR}
    long = {names.TENSORS, names.SKIPPED}
    assert names.STATED - set(names.LISTED) == of_this_node | long | {
        names.FORMAT,
        names.METADATA_KEYS,
    }
