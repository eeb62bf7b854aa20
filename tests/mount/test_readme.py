"""The transcript of ATTRIBUTES.md is what a shell really prints."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Node

pytestmark = pytest.mark.mount

PAGE = Path(__file__).parents[2] / "ckptfs" / "ATTRIBUTES.md"
MARK = "-- next --"


def transcript(heading: str) -> list[tuple[str, str]]:
    """Commands of the first console block below a heading, each with the output shown there."""
    section = PAGE.read_text().split(f"# {heading}\n")[1]
    block = re.search(r"```console\n(.*?)```", section, re.DOTALL)
    assert block
    steps = re.split(r"^\$ ", block[1], flags=re.MULTILINE)[1:]
    return [(command, output) for command, _, output in (step.partition("\n") for step in steps)]


def test_the_transcript_of_the_metadata_section(
    node: Node, small: Path, uri_of: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # rclone does not understand the checksums that the AWS SDK sends by default.
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    monkeypatch.setenv("URI", uri_of(small))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    steps = transcript("Metadata and state as attributes")
    assert len(steps) >= 8
    script = "".join(f"{command}\necho '{MARK}'\n" for command, _ in steps)
    said = node.run("bash", "-e", "-c", script).stdout.split(f"{MARK}\n")
    for (command, expected), output in zip(steps, said, strict=False):
        shown = "".join(line.rstrip() + "\n" for line in output.splitlines())
        assert shown == expected, command
