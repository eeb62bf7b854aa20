"""The prose of the project has subjects: each ceiling here may fall, and never rises."""

from pathlib import Path

import pytest
from support.prose import Count, count, texts

PROJECT = Path(__file__).parents[1]
CEILINGS = {
    "README.md": (0.1, 0.1),
    "ckptfs": (0.1, 0.1),
    "scripts": (0.1, 0.1),
    "tests": (0.2, 0.2),
}
"""By folder: whoever, nobody, somebody and anybody per 1,000 words (trio has 0.03, httpcore 0), and
sentences per 1,000 words that open with a clause as their subject (trio has 0.1)."""
THIS = {PROJECT / "tests" / "test_prose.py", PROJECT / "tests" / "support" / "prose.py"}


def files(folder: str) -> list[Path]:
    top = PROJECT / folder
    found = [*top.rglob("*.py"), *top.rglob("*.md")]
    return [path for path in found if path not in THIS]


@pytest.mark.parametrize("folder", CEILINGS)
def test_prose_of_each_folder_has_few_impersonal_and_headless_sentences(folder: str) -> None:
    paths = [PROJECT / folder] if folder.endswith(".md") else files(folder)
    counts = {path: [count(text) for text in texts(path)] for path in paths}
    words = sum(each.words for found in counts.values() for each in found)
    impersonal = [(p.name, s) for p, found in counts.items() for c in found for s in c.impersonal]
    headless = [(p.name, s) for p, found in counts.items() for c in found for s in c.headless]
    assert words > 1000
    assert 1000 * len(impersonal) / words <= CEILINGS[folder][0], impersonal
    assert 1000 * len(headless) / words <= CEILINGS[folder][1], headless


def test_count_of_prose_finds_each_kind_and_leaves_questions_alone() -> None:
    text = "What is not known is refused. Whoever looks first attaches.\n\nThe daemon starts."
    found = count(text)
    assert found.words == 13
    assert found.headless == ["What is not known is refused.", "Whoever looks first attaches."]
    assert found.impersonal == ["Whoever looks first attaches."]
    assert count("What is it?") == Count(3, [], [])
    assert count("A list:\n- Who asks waits.").headless == ["Who asks waits."]
