"""The limits of all fetches together, by the settings and the machine."""

from typing import Any

import pytest
from support.fakes import MIB

from ckptfs._daemon.fetch import limits
from ckptfs._daemon.fetch.limits import Limits, limits_of
from ckptfs._model.config import Config

GIB = 1 << 30


@pytest.mark.parametrize(
    ("cores", "memory_bytes", "expected"),
    [
        (2, 4 * GIB, Limits(32, 128 * MIB, 64 * MIB)),
        (16, 64 * GIB, Limits(32, 128 * MIB, 64 * MIB)),
        (32, 256 * GIB, Limits(64, 256 * MIB, 128 * MIB)),
        (100, 1024 * GIB, Limits(128, 512 * MIB, 256 * MIB)),
        (100, 8 * GIB, Limits(128, 256 * MIB, 128 * MIB)),
        (100, GIB, Limits(128, 128 * MIB, 64 * MIB)),
    ],
)
def test_limits_grow_with_the_node(
    monkeypatch: pytest.MonkeyPatch, cores: int, memory_bytes: int, expected: Limits
) -> None:
    of_machine(monkeypatch, cores, memory_bytes)
    assert limits_of(config()) == expected


def test_settings_come_before_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    of_machine(monkeypatch, 100, 1024 * GIB)
    assert limits_of(config(connections_max=3)) == Limits(3, 128 * MIB, 64 * MIB)
    assert limits_of(config(in_flight_bytes_max=5)) == Limits(128, 5, 64 * MIB)
    assert limits_of(config(window_bytes_max=0)) == Limits(128, 512 * MIB, 0)


def of_machine(monkeypatch: pytest.MonkeyPatch, cores: int, memory_bytes: int) -> None:
    monkeypatch.setattr(limits, "usable_cores", lambda: cores)
    monkeypatch.setattr(limits, "usable_memory_bytes", lambda: memory_bytes)


def config(**settings: Any) -> Config:
    return Config(socket="/s", mount="/m", cache_dir="/c", **settings)
