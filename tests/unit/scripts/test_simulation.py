"""The simulator: it shares fairly, and foretells the real runs that are kept."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from simulation import __main__ as command
from simulation import calibration, ways
from simulation.flow import Stage, fair, run, wait

GB = ways.GB
NO_LIMITS = ways.Scenario(
    nodes=1,
    size=2 * GB,
    files=1,
    connection=1e8,
    latency_s=0.0,
    store=np.inf,
    requests=np.inf,
    link=np.inf,
    disk=np.inf,
    cpus=np.inf,
    import_s=0.0,
    readers=1,
    spread=0.0,
)
NO_COSTS = ways.Costs(
    copy=0.0,
    mount=0.0,
    bring=0.0,
    local=1e-15,
    cached=1e-15,
    start=dict.fromkeys(calibration.WAYS, 0.0),
)


def three_nodes() -> calibration.Run:
    """One of the runs that are foretold."""
    return next(run_ for run_ in calibration.read() if run_.nodes == 3)


def test_it_foretells_the_real_runs() -> None:
    figures = calibration.check()
    assert {figure.run.nodes for figure in figures} == {2, 3, 4}
    assert [
        f"{f.run.nodes} {f.way} {f.name} {f.error:+.0%}" for f in figures if not f.is_good
    ] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("COPY_CONNECTIONS", 2), ("WINDOW_BYTES", ways.WINDOW_BYTES // 4)],
)
def test_with_other_numbers_it_would_not(
    monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    monkeypatch.setattr(ways, name, value)
    assert not all(figure.is_good for figure in calibration.check())


def test_without_the_costs_of_cpus_it_would_not() -> None:
    run_ = three_nodes()
    assert not all(figure.is_good for figure in calibration.predict(run_, NO_COSTS))


def test_the_costs_come_from_none_of_the_runs_that_it_has_to_foretell() -> None:
    assert all(nodes != 3 for nodes, _ in calibration.FITTED)


def test_a_figure_that_is_too_far_off_is_not_good() -> None:
    run_ = three_nodes()
    assert not calibration.Figure(run_, "ray", "there", 1.26, 1.0).is_good
    assert calibration.Figure(run_, "ray", "there", 1.24, 1.0).is_good
    assert not calibration.Figure(run_, "ray", "sent", 1.03, 1.0).is_good


def test_what_is_shared_is_shared_fairly() -> None:
    rates = fair(np.array([1.0, 10.0, 10.0]), np.array([[1.0, 1.0, 1.0]]), np.array([9.0]))
    assert rates == pytest.approx([1.0, 4.0, 4.0])


def test_who_needs_nothing_of_what_is_used_up_has_its_own_limit() -> None:
    rates = fair(np.array([8.0, 8.0]), np.array([[2.0, 0.0]]), np.array([4.0]))
    assert rates == pytest.approx([2.0, 8.0])


def test_nodes_that_end_leave_their_share_to_the_others() -> None:
    # Both get 5 a second until the first is done; then the other one gets 8.
    stages = [Stage(10.0, 8.0, {"store": 1.0})]
    assert run(stages, 2, {"store": 10.0}, seed=0) == pytest.approx(np.array([[2.0, 2.0]]))
    late = run([wait(1.0, spread=0.5), *stages], 2, {"store": 10.0}, seed=0)
    first, last = sorted(late[1])
    begun = sorted(late[0])
    shared_s = first - begun[1]
    assert (begun[1] - begun[0]) * 8 + shared_s * 5 == pytest.approx(10.0, rel=0.01)
    assert shared_s * 5 + (last - first) * 8 == pytest.approx(10.0, rel=0.01)


def test_a_store_that_is_used_up_takes_what_its_bytes_take() -> None:
    store = replace(NO_LIMITS, nodes=100, store=1e9)
    for way in (ways.copy, ways.mount, ways.plan):
        result = way(store, NO_COSTS)
        assert result.sent == 100
        assert result.read_s == pytest.approx(200.0, rel=0.02)


@pytest.mark.parametrize("files", [1, 3, 10, 24, 1000])
def test_every_node_gets_all_bytes_however_they_are_divided(files: int) -> None:
    # At 1 byte/s of the store, all else is nothing.
    slow = replace(NO_LIMITS, size=64 * GB, files=files, readers=8, store=1.0)
    assert ways.copy(slow, NO_COSTS).there_s == pytest.approx(64 * GB)
    assert ways.mount(slow, NO_COSTS).read_s == pytest.approx(64 * GB)


def test_a_copy_of_one_file_has_one_connection_and_a_plan_sixteen() -> None:
    assert ways.copy(NO_LIMITS, NO_COSTS).there_s == pytest.approx(20.0, rel=0.001)
    assert ways.plan(NO_LIMITS, NO_COSTS).there_s == pytest.approx(20.0 / 16, rel=0.001)


def test_a_mount_reads_a_large_file_with_the_connections_of_a_window() -> None:
    large = replace(NO_LIMITS, size=200 * GB)
    assert ways.mount(large, NO_COSTS).read_s == pytest.approx(2000.0 / 8, rel=0.01)


def test_a_plan_is_fetched_during_the_import() -> None:
    importing = replace(NO_LIMITS, import_s=30.0)
    assert ways.plan(importing, NO_COSTS).read_s == pytest.approx(30.0)
    assert ways.copy(importing, NO_COSTS).read_s == pytest.approx(50.0)


def test_a_broadcast_is_sent_once_and_in_the_end_limited_by_its_driver() -> None:
    few, many = (
        ways.broadcast(replace(NO_LIMITS, nodes=n, size=100 * GB), NO_COSTS) for n in (8, 4096)
    )
    assert few.sent == many.sent == 1
    calls = 100 * GB / ways.CHUNK_BYTES[1] * 4096
    assert many.there_s == pytest.approx(calls / NO_LIMITS.calls, rel=0.01)
    assert few.there_s < 20


def test_a_seed_says_all() -> None:
    scenario = ways.Scenario(nodes=64)
    costs = calibration.of_real_nodes()
    assert ways.mount(scenario, costs, 7) == ways.mount(scenario, costs, 7)
    assert ways.mount(scenario, costs, 7) != ways.mount(scenario, costs, 8)


def test_the_command_takes_numbers_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--nodes", "8", "64", "--link", "100", "--latency", "0", "--json"]
    monkeypatch.setattr(sys, "argv", ["simulate", *arguments])
    assert command.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scenario"]["link"] == 100e9 / 8
    assert found["nodes"]["64"]["copy"]["sent"] == 64
    assert found["nodes"]["64"]["broadcast"]["sent"] == 1


@pytest.mark.parametrize("wrong", ["0", "-1", "nan", "inf", "many"])
def test_the_command_refuses_numbers_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", f"--rate={wrong}"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--rate: invalid number" in capsys.readouterr().err


def test_the_command_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--check"])
    assert command.main() == 0
    assert "TOO FAR" not in capsys.readouterr().out
    monkeypatch.setattr(calibration, "TOLERANCE", 0.001)
    assert command.main() == 1
    assert "TOO FAR" in capsys.readouterr().out
