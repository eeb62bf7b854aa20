"""The report: its figures, and that no name can make its page do anything."""

from html.parser import HTMLParser
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ckptfs._model.formats.headers import Tensor
from ckptfs._model.plans import ranges
from ckptfs._model.plans.trace import Access, Fetch
from ckptfs._report import analysis, page

MIB = 1 << 20
some_pairs = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)


def positions(found: list[tuple[int, int]]) -> set[int]:
    return {at for start, stop in found for at in range(start, stop)}


@given(some_pairs, some_pairs, st.integers(0, 60), st.integers(0, 60))
def test_ranges_are_sets(
    some: list[tuple[int, int]], others: list[tuple[int, int]], start: int, stop: int
) -> None:
    one, other = ranges.union(some), ranges.union(others)
    assert positions(one) == positions(some)
    assert all(a[1] < b[0] for a, b in pairwise(one))
    assert ranges.length(one) == len(positions(some))
    assert ranges.within(one, start, stop) == len(positions(some) & set(range(start, stop)))
    assert positions(ranges.without(one, other)) == positions(some) - positions(others)


FILES = {0: ("a.safetensors", 4 * MIB), 3: ("b.bin", 10 * MIB)}
ACCESSES = [
    Access(0, 7, 0, MIB, 4, 1, 0.5, 1.0, 2.0),
    Access(0, 8, MIB // 2, 2 * MIB, 2, 0, 0.0, 1.5, 1.6),
    Access(3, 7, 0, MIB, 2, 1, 0.25, 3.0, 4.0),
    Access(5, 7, 0, MIB, 2, 1, 0.25, 3.0, 400.0),  # of a file that nobody has named
]
FETCHES = [
    Fetch(0, 0, 2 * MIB, "demand", 1, "", 0.9, 1.0, 1.5),
    Fetch(3, 0, 8 * MIB, "readahead", 2, "", 1.0, 2.0, 3.5),
    Fetch(3, 8 * MIB, 10 * MIB, "prefetch", 3, "503 <b>slow</b>", 1.0, 2.0, 3.0),
]


def test_the_figures_of_a_summary() -> None:
    summary = analysis.summarise(FILES, ACCESSES, FETCHES)
    assert [use.path for use in summary.files] == ["a.safetensors", "b.bin"]
    assert summary.seconds == 4.0
    assert summary.read_bytes == MIB + 3 * MIB // 2 + MIB
    assert summary.fetched_bytes == 10 * MIB
    assert summary.waste_bytes == 7 * MIB
    assert (summary.reads, summary.waits, summary.waited_s) == (8, 2, 0.75)
    assert (summary.requests, summary.failed) == (6, 1)
    assert summary.hit_ratio == 0.75
    first, second = summary.processes
    assert (first.pid, first.files, first.reads, first.waited_s) == (7, 2, 6, 0.75)
    assert (second.pid, second.files, second.read_bytes) == (8, 1, 3 * MIB // 2)


def test_what_the_kernel_reads_unseen_is_no_waste() -> None:
    summary = analysis.summarise(FILES, ACCESSES, FETCHES, passthrough=[3])
    assert summary.waste_bytes == 0


def test_tensors_are_found_by_their_bytes() -> None:
    use = analysis.summarise(FILES, ACCESSES, FETCHES).files[0]
    tensors = [
        Tensor("late", "F32", (2, 3), MIB, 3 * MIB),
        Tensor("first", "F32", (), 100, MIB),
        Tensor("never", "F32", (), 3 * MIB, 4 * MIB),
        Tensor("empty", "F32", (0,), 100, 100),
    ]
    found = analysis.tensor_uses(use, tensors)
    assert [(each.tensor.name, each.read_bytes, each.first_s) for each in found] == [
        ("first", MIB - 100, 1.0),
        ("late", MIB, 1.5),
    ]


def test_rates_add_up() -> None:
    found = analysis.rates([(1.0, 3.0, 400), (0.0, 4.0, 100), (2.0, 2.0, 50)], 4.0, 8)
    assert round(sum(found) * 0.5) == 550
    assert [round(rate) for rate in found[:3]] == [25, 25, 225]
    assert analysis.rates([(0.0, 0.0, 1)], 0.0, 3) == [0.0] * 3


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"


def test_names_do_nothing_on_the_page() -> None:
    summary = analysis.summarise({0: (HOSTILE, 4 * MIB), 3: ("b", 10 * MIB)}, ACCESSES, FETCHES)
    tensors = analysis.tensor_uses(summary.files[0], [Tensor(HOSTILE, HOSTILE, (1,), 0, 2 * MIB)])
    about = page.About(HOSTILE, HOSTILE, HOSTILE, 14 * MIB, 2, [HOSTILE], {7: HOSTILE})
    found = _Page()
    html = page.render(about, summary, tensors)
    found.feed(html)
    assert not found.tags & {"script", "img", "iframe", "link", "object", "a", "form"}
    assert not any(name.startswith("on") or name in ("src", "href") for name in found.attributes)
    assert found.text.count(HOSTILE) >= 7  # title, heading, note, names, tensor, process
    assert "503 <b>slow</b>" in found.text
    assert "default-src 'none'" in html


def test_a_page_of_nothing_and_one_of_much() -> None:
    about = page.About("s3://b/run", "v", "now", 0, 0, [], {})
    assert "<svg" not in page.render(about, analysis.summarise({}, [], []), [])
    files = {index: (f"f{index}", MIB) for index in range(100)}
    accesses = [
        Access(index % 100, 1, 0, 100, 1, 0, 0.0, index / 1000, index / 1000)
        for index in range(20_000)
    ]
    html = page.render(about, analysis.summarise(files, accesses, []), [])
    assert "and 40 files more, used later" in html
    assert len(html) < 4_000_000
