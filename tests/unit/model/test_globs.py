"""Globs on paths."""

import pytest

from ckptfs._model.globs import any_matcher, matcher


@pytest.mark.parametrize(
    ("glob", "path", "is_matched"),
    [
        ("*.pt", "deep/in/model.pt", True),
        ("*.pt", "model.PT", False),
        ("model-?", "model-1", True),
        ("model-[0-3]", "model-4", False),
        ("a", "a", True),
        ("a", "aa", False),
    ],
)
def test_glob_matches_whole_paths_with_case(glob: str, path: str, is_matched: bool) -> None:
    assert bool(matcher(glob)(path)) == is_matched
    assert any_matcher(["other", glob])(path) == is_matched


def test_globs_without_globs_match_nothing() -> None:
    assert not any_matcher([])("a")
