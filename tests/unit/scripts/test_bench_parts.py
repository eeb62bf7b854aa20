"""The benchmark's parts that compute or start something: CPU time, the ceiling, its stores."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from benchmark import ceiling, gil, link, nginx, processes, scale
from benchmark.__main__ import CASES, describe_cases
from benchmark.report import markdown
from benchmark.results import Panel, Report, amount, best
from benchmark.starting import RAW_THREADS, USERS
from benchmark.stores import Store

TICKS = processes.TICKS_PER_S


def stat_line(name: str, utime: int, stime: int, cutime: int, cstime: int) -> str:
    return f"7 ({name}) S 3 7 7 0 -1 4194304 9 0 0 0 {utime} {stime} {cutime} {cstime} 20 0 1 0 5"


def test_cpu_time_is_read_behind_a_name_with_blanks_and_parentheses() -> None:
    line = stat_line("a) S (b c", TICKS, TICKS // 2, 3 * TICKS, TICKS)
    assert processes.own_cpu_s(line) == 1.5
    assert processes.cpu_with_ended_s(line) == 5.5
    assert processes.fields_of(line)[1] == "3"


def test_busiest_thread_is_the_one_that_took_most_between_two_looks() -> None:
    old, new, other = (processes.Thread(1, tid) for tid in (1, 2, 3))
    before = {old: 10.0, other: 1.0}
    assert processes.busiest_s(before, {old: 10.5, new: 0.25, other: 1.0}) == 0.5
    assert processes.busiest_s(before, {old: 10.1, new: 0.75}) == 0.75
    assert processes.busiest_s(before, {}) == 0.0


def test_schedule_between_two_looks() -> None:
    thread, new, ended = (processes.Thread(1, tid) for tid in (1, 2, 3))
    before = {thread: processes.schedule_of("1000000000 500000000 9\n")}
    after = {thread: processes.schedule_of("1500000000 2500000000 12\n")}
    after |= {new: processes.Schedule(0.25, 0.0)}
    assert processes.schedule_between(before, after, thread) == (0.5, 2.0)
    assert processes.schedule_between(before, after, new) == (0.25, 0.0)
    assert processes.schedule_between(before, after, ended) == (0.0, 0.0)


def test_tree_of_processes_counts_children_that_have_ended() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    before = processes.tree_cpu_s(os.getpid())
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert processes.tree_cpu_s(os.getpid()) - before >= 0.28


def test_own_process_has_threads_memory_and_a_parent() -> None:
    me = os.getpid()
    assert processes.Thread(me, me) in processes.thread_cpu_s(me)
    assert processes.parent_of(me) == os.getppid()
    assert processes.memory_bytes(me) > 0
    assert processes.peak_bytes(me) > 0


def test_ended_process_has_no_memory() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert processes.memory_bytes(process.pid) == 0
    assert processes.thread_cpu_s(process.pid) == {}


def test_samples_of_the_lock_count_for_the_innermost_process_and_its_thread() -> None:
    keeper, daemon = 'process 10:"python -m keeper"', 'process 11:"python -m app --fd 4"'
    raw = (
        f"{keeper};thread (10): MainThread;run (keeper.py:5) 3\n"
        f"{keeper};{daemon};thread (11): MainThread;main (app.py:1);<m> 40\n"
        f"{keeper};{daemon};thread (15): a;b;main (app.py:2) 2\n"
        f"{keeper};{daemon};thread (11): MainThread;main (app.py:3) 5\n"
        "\n"
    )
    assert gil.parse_samples(raw) == {
        processes.Thread(10, 10): 3,
        processes.Thread(11, 11): 45,
        processes.Thread(11, 15): 2,
    }


def test_time_without_a_cpu_is_not_time_of_the_lock() -> None:
    assert gil.on_cpu_s(2.0, ran_s=1.0, waited_s=3.0) == 0.5
    assert gil.on_cpu_s(2.0, ran_s=0.0, waited_s=0.0) == 2.0


def test_last_message_of_py_spy_has_the_number_of_samples() -> None:
    assert gil.taken_samples("py-spy> Wrote raw data. Samples: 285 Errors: 1") == 285
    assert gil.taken_samples("py-spy> Permission denied") == 0


def test_ceiling_is_the_thread_or_the_lock_that_takes_longer() -> None:
    gib_in_gb = 2**30 / 1e9
    assert ceiling.gb_per_s(0.5, 0.1) == pytest.approx(2 * gib_in_gb)
    assert ceiling.gb_per_s(0.1, 0.8) == pytest.approx(1.25 * gib_in_gb)


def test_ceiling_takes_each_round_and_does_without_the_lock() -> None:
    threads = {"cold": [0.5, 0.25, 0.0], "warm": [0.1]}
    found = ceiling.ceilings_of(threads, {"cold": [0.4]})
    gib_in_gb = 2**30 / 1e9
    assert found["cold"] == pytest.approx([2 * gib_in_gb, 2.5 * gib_in_gb])
    assert found["warm"] == pytest.approx([10 * gib_in_gb])


def test_site_with_tls_sends_full_records_from_large_buffers(tmp_path: Path) -> None:
    site = nginx.Site("127.0.0.1:1", upstream="127.0.0.1:2", pem=tmp_path / "pem")
    text = nginx.configuration(site, tmp_path)
    assert "listen 127.0.0.1:1 ssl;" in text
    assert f"ssl_certificate {tmp_path}/pem;" in text
    assert "proxy_buffer_size 128k;" in text
    assert "ssl_protocols TLSv1.2 TLSv1.3;" in text
    assert "upstream server { server 127.0.0.1:2; keepalive 64; }" in text
    assert "load_module" not in text
    assert "limit_rate" not in text


def test_site_with_limits_waits_and_throttles(tmp_path: Path) -> None:
    site = nginx.Site("127.0.0.1:1", upstream="127.0.0.1:2", latency_s=0.02, rate="90m")
    text = nginx.configuration(site, tmp_path)
    assert "location / { echo_sleep 0.02; echo_exec @server; }" in text
    assert "limit_rate 90m;" in text
    assert "load_module" in text
    assert "ssl_certificate" not in text


@pytest.mark.parametrize("site", [{"upstream": "127.0.0.1:2"}, {"root": Path("/srv")}])
def test_configuration_has_as_many_closing_as_opening_braces(
    site: dict[str, object], tmp_path: Path
) -> None:
    text = nginx.configuration(nginx.Site("127.0.0.1:1", **site), tmp_path)  # pyright: ignore
    assert text.count("{") == text.count("}")


@pytest.mark.skipif(bool(nginx.why_missing()), reason="nginx is not installed")
def test_static_site_serves_files_from_a_socket_of_its_parent(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_bytes(b"content")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        with (
            nginx.serving(nginx.Site(f"{host}:{port}", root=root), tmp_path / "nginx", listener),
            socket.create_connection((host, port)) as client,
        ):
            client.sendall(b"GET /file HTTP/1.0\r\n\r\n")
            answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"content")


def test_link_has_a_rate_at_the_end_of_the_store() -> None:
    *_, last = link.setup_commands("ckb7")
    assert last[:3] == ["tc", "-n", "ckb7"]
    assert last[-6:-2] == ["rate", "2gbit", "burst", "1m"]
    assert all(len(part) < 16 for command in link.setup_commands("ckb4194304") for part in command)


def test_few_cpus_get_few_readers() -> None:
    assert scale.readers_for(2) == scale.readers_for(7) == (1, 2, 4)
    assert scale.readers_for(8) == scale.readers_for(192) == (1, 8, 32)


def test_store_with_tls_is_made_again_from_a_job_and_names_its_authority() -> None:
    plain, tls = Store("open", "127.0.0.1:1"), Store("TLS", "127.0.0.1:1", "/tmp/ca file.pem")
    again = Store.of(tls.job())
    assert (again.endpoint, again.ca_file) == (tls.endpoint, tls.ca_file)
    assert (plain.url, tls.url) == ("http://127.0.0.1:1", "https://127.0.0.1:1")
    assert tls.environment()["AWS_CA_BUNDLE"] == tls.ca_file
    assert "SSL_CERT_FILE" not in plain.environment()
    parameters = parse_qs(urlsplit(tls.uri("bench/model")).query)
    assert parameters["scheme"] == ["https"]
    assert parameters["tls_ca_file_path"] == [tls.ca_file]
    assert parse_qs(urlsplit(plain.uri("bench/model")).query)["scheme"] == ["http"]


def test_stores_are_started_for_cases_that_exist() -> None:
    assert USERS.keys() == RAW_THREADS.keys()
    assert set().union(*USERS.values()) <= CASES.keys()


def test_help_has_a_line_for_each_case() -> None:
    lines = describe_cases().splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(CASES)
    assert all(len(line.split()) > 2 for line in lines)


def test_best_is_the_series_with_the_least_median() -> None:
    taken = {"a": [1.0, 9.0, 9.0], "b": [3.0, 3.0, 3.0], "c": []}
    assert best(taken, "a", "b", "c", "d") == [3.0, 3.0, 3.0]
    assert best(taken, "c", "d") is None


def test_pages_have_tables_for_tls_and_the_ceiling() -> None:
    host = {"cpus": "2", "cpu": "x", "kernel": "6", "filesystem": "ext4"}
    panels = [
        Panel(case="load-tls", title="load, TLS", unit="s", series={"raw": [1.0], "ckptfs": [2.0]}),
        Panel(case="ceiling", title="thread", unit="s", series={"cold, 1 reader": [0.5]}),
        Panel(case="ceiling", title="each", unit="s", series={"cold, 1 reader: daemon": [0.4]}),
        Panel(case="ceiling", title="most", unit="GB/s", series={"cold, 1 reader": [2.0]}),
    ]
    goals = [amount("ceiling", "one daemon", "GB/s", [2.0], at_least=6)]
    report = Report(
        date="2026-01-01",
        commit="c",
        quick=False,
        host=host,
        versions={},
        panels=panels,
        goals=goals,
    )
    lines = markdown(report).splitlines()
    assert "| median seconds | load, TLS |" in lines
    assert "| ckptfs | 2 |" in lines
    assert "| `ceiling` | thread (s) | most (GB/s) |" in lines
    assert "| cold, 1 reader | 0.5 | 2 |" in lines
