"""The check that a file is this user's alone."""

import os
from pathlib import Path

import pytest

from ckptfs._os.ownership import is_this_users_alone


def status(uid: int, mode: int) -> os.stat_result:
    return os.stat_result((0o100000 | mode, 1, 1, 1, uid, 0, 0, 0, 0, 0))


@pytest.fixture(params=[0, 1000], ids=["root", "user"])
def uid(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(os, "geteuid", lambda: request.param)
    return request.param


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755, 0o400, 0o1755])
def test_ownership_of_own_file_without_others_write_is_accepted(uid: int, mode: int) -> None:
    assert is_this_users_alone(status(uid, mode))


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o777, 0o1777, 0o2770])
def test_ownership_of_file_that_group_or_others_write_is_refused(uid: int, mode: int) -> None:
    assert not is_this_users_alone(status(uid, mode))
    assert not is_this_users_alone(status(uid, mode), or_roots=True)


def test_ownership_of_another_users_file_is_refused(uid: int) -> None:
    assert not is_this_users_alone(status(uid + 1, 0o600))
    assert not is_this_users_alone(status(uid + 1, 0o600), or_roots=True)


def test_ownership_of_roots_file_is_accepted_only_where_asked(uid: int) -> None:
    assert is_this_users_alone(status(0, 0o600), or_roots=True)
    assert is_this_users_alone(status(0, 0o600)) == (uid == 0)


@pytest.mark.parametrize(
    ("forbidden", "mode", "is_accepted"),
    [
        (0o002, 0o664, True),  # a configuration: the user's own group may write
        (0o002, 0o646, False),
        (0o027, 0o640, True),  # credentials: a group may read
        (0o027, 0o644, False),
        (0o027, 0o620, False),
        (0o027, 0o601, False),
    ],
)
def test_ownership_with_other_forbidden_bits_refuses_those(
    uid: int, forbidden: int, mode: int, is_accepted: bool
) -> None:
    assert is_this_users_alone(status(uid, mode), forbidden) == is_accepted


def test_ownership_of_a_real_file_follows_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch(0o600)
    with file.open() as opened:
        assert is_this_users_alone(os.fstat(opened.fileno()))
        file.chmod(0o606)
        assert not is_this_users_alone(os.fstat(opened.fileno()))
