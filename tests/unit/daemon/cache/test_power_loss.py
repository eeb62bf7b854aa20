"""After a loss of power, whatever of the cache reached the disk: no wrong byte is read from it."""

import random
import shutil
from pathlib import Path

import pytest
from support.powerloss import Recorder, image
from support.rig import rig_in
from unit.daemon.cache.test_disk_faults import ALL, LIMIT, SIZES, Scenario

from ckptfs._daemon.cache import object_dir

CRASHES = 250 if ALL else 12


async def test_a_loss_of_power_loses_no_more_than_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_bytes = 0
    for seed in range(4):
        kept_bytes += await _lose_power(tmp_path / str(seed), monkeypatch, seed)
    assert kept_bytes > 0  # the cache was of use


async def _lose_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> int:
    """Bytes that needed not be fetched again, of all crashes."""
    tmp_path.mkdir()
    boot = "first"
    # Times say nothing here, so that all depends on what else tells one boot from another.
    monkeypatch.setattr(object_dir, "stamp", lambda _: boot)
    recorder = Recorder()
    scenario = Scenario(tmp_path / "before", seed)
    scenario.same_times = True
    scenario.on_change = lambda: recorder.mark(dict(scenario.store._objects))
    with recorder.watching():
        scenario.on_change()
        await scenario.session(steps=14)
        await scenario.session(steps=6)
    chance = random.Random(seed)
    after = Scenario(tmp_path / "after", seed)
    kept_bytes = 0
    boot = "second"
    for _ in range(CRASHES):
        after.directory.mkdir()
        after.store._objects = image(recorder.events, chance, after.directory / "cache")
        async with rig_in(after.directory, cache_bytes_max=LIMIT) as rig:
            after.check(rig)
            for name in chance.sample(list(SIZES), len(SIZES)):
                file = rig.open(after.store, name)
                await after.read(rig, file, 0, SIZES[name])
                kept_bytes += SIZES[name] - file.activity.total().fetched_bytes
                await rig.quiet()
                after.check(rig)
                rig.fetcher.close(file)
        shutil.rmtree(after.directory)
    return kept_bytes
