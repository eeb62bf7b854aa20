"""The course of a broadcast: every chunk is read once, and everybody gets it, whatever happens."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fakes import MIB

from ckptfs.ray._schedule import TRIES, Chunk, Course, Piece, chunks_of


def chunks(count: int) -> list[Chunk]:
    return [(Piece("f", 4 * i, 4, 4 * MIB),) for i in range(count)]


def course_of(count: int, names: str = "abc", *, window: int = 4, gives_max: int = 2) -> Course:
    return Course(chunks(count), {n: set() for n in names}, window * 4 * MIB, gives_max)


class Cluster:
    """Nodes that do what a course says, in any order, and what goes wrong there."""

    def __init__(self, course: Course, seed: int = 0) -> None:
        self.course = course
        self.random = random.Random(seed)
        self.gives: list[tuple[int, str]] = []
        self.takes: list[tuple[int, str]] = []
        self.objects: set[int] = set()
        self.read: Counter[int] = Counter()
        self.gone: set[str] = set()
        self.most_objects = 0

    def begin(self) -> None:
        while (step := self.course.next_give()) is not None:
            self.gives.append(step[:2])
            self.most_objects = max(self.most_objects, len(self.gives) + len(self.objects))

    def step(self) -> None:
        """One thing happens."""
        if self.takes and (not self.gives or self.random.random() < 0.6):
            chunk, name = self.takes.pop(self.random.randrange(len(self.takes)))
            self.course.took(chunk, name, whole=True)
        else:
            chunk, name = self.gives.pop(self.random.randrange(len(self.gives)))
            self.read[chunk] += 1
            self.objects.add(chunk)
            self.takes += [(chunk, taker) for taker in self.course.gave(chunk, name)]
        self.objects = {c for c in self.objects if self.course.is_under_way(c)}

    def lose(self, name: str) -> None:
        self.gone.add(name)
        self.gives = [g for g in self.gives if g[1] != name]
        self.takes = [t for t in self.takes if t[1] != name]
        self.course.lost(name)

    def run(self) -> None:
        self.begin()
        while not self.course.is_done:
            self.step()
            self.begin()
        assert not self.gives
        assert not self.takes


@given(
    count=st.integers(0, 30),
    nodes=st.integers(1, 6),
    window=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_each_chunk_is_read_once_and_everybody_has_it(
    count: int, nodes: int, window: int, seed: int
) -> None:
    cluster = Cluster(course_of(count, "abcdef"[:nodes], window=window), seed)
    cluster.run()
    assert cluster.read == Counter(range(count))
    assert all(cluster.course.left(name) == 0 for name in "abcdef"[:nodes])
    assert cluster.course.bytes_there() == (nodes * count * 4 * MIB,) * 2
    assert cluster.most_objects <= window


@given(seed=st.integers(0, 1000), count=st.integers(1, 20), when=st.integers(0, 60))
def test_a_node_that_dies_costs_the_others_nothing(seed: int, count: int, when: int) -> None:
    cluster = Cluster(course_of(count), seed)
    cluster.begin()
    for _ in range(when):
        if cluster.course.is_done:
            break
        cluster.step()
        cluster.begin()
    cluster.lose("b")
    cluster.run()
    assert cluster.course.left("a") == cluster.course.left("c") == 0
    assert sum(cluster.read.values()) <= count + 2  # what it was the only one to have


@given(seed=st.integers(0, 1000), count=st.integers(1, 20), rate=st.floats(0, 0.7))
def test_whatever_fails_it_ends(seed: int, count: int, rate: float) -> None:
    cluster = Cluster(course_of(count), seed)
    course, chance = cluster.course, random.Random(seed)
    cluster.begin()
    while not course.is_done:
        if chance.random() >= rate:
            cluster.step()
        elif cluster.gives:
            chunk, name = cluster.gives.pop()
            course.gave_not(chunk, name, for_good=chance.random() < 0.1)
        else:
            chunk, name = cluster.takes.pop()
            if chance.random() < 0.1:
                course.full(name)
            if chance.random() < 0.2:
                course.set_aside(course.laggards())
            course.took(chunk, name, whole=False)
        cluster.begin()
    assert max(cluster.read.values(), default=0) <= TRIES
    assert not cluster.gives
    assert not cluster.takes


def test_who_has_it_gives_it() -> None:
    course = Course(chunks(6), {"a": set(range(6)), "b": set(range(6)), "c": set()}, 1 << 40, 2)
    cluster = Cluster(course)
    cluster.begin()
    assert {name for _, name in cluster.gives} == {"a", "b"}
    cluster.run()
    assert course.left("c") == 0


@given(seed=st.integers(0, 1000), count=st.integers(0, 20), has=st.sets(st.integers(0, 19)))
def test_a_source_gives_what_it_has_and_gets_nothing(seed: int, count: int, has: set[int]) -> None:
    has = {chunk for chunk in has if chunk < count}
    course = Course(chunks(count), {"a": set(), "s": has, "b": set()}, 16 * MIB, 2, {"s"})
    cluster, given_by_it = Cluster(course, seed), set[int]()
    cluster.begin()
    while not course.is_done:
        given_by_it |= {chunk for chunk, name in cluster.gives if name == "s"}
        assert "s" not in {name for _, name in cluster.takes}
        cluster.step()
        cluster.begin()
    assert given_by_it == has
    assert course.left("a") == course.left("b") == 0
    assert course.bytes_there() == (2 * count * 4 * MIB,) * 2


def test_chunks_of_a_lost_source_come_from_the_store() -> None:
    course = Course(chunks(6), {"a": set(), "s": set(range(6)), "b": set()}, 1 << 40, 2, {"s"})
    cluster = Cluster(course)
    cluster.begin()
    assert {name for _, name in cluster.gives} == {"s"}
    cluster.lose("s")
    cluster.run()
    assert course.left("a") == course.left("b") == 0


def test_a_busy_owner_stops_no_other() -> None:
    """The first chunks are on one node only, which gives two at a time."""
    course = Course(chunks(6), {"a": {0, 1, 2, 3}, "b": {4, 5}, "c": set()}, 1 << 40, 2)
    begun = [course.next_give() for _ in range(5)]
    assert begun == [(0, "a", True), (1, "a", True), (4, "b", True), (5, "b", True), None]
    course.gave(0, "a")
    assert course.next_give() == (2, "a", True)


def test_an_owner_that_fails_gets_the_chunk_from_another() -> None:
    course = Course(chunks(1), {"a": {0}, "b": set()}, 1 << 40, 2)
    assert course.bytes_there() == (4 * MIB, 8 * MIB)
    assert course.next_give() == (0, "a", True)
    course.gave_not(0, "a")
    assert course.bytes_there() == (0, 8 * MIB)
    assert course.next_give() == (0, "b", True)
    assert course.gave(0, "b") == ["a"]
    course.took(0, "a", whole=True)
    assert course.is_done
    assert course.left("a") == course.left("b") == 0


def test_a_lost_owner_is_replaced_by_the_store() -> None:
    course = Course(chunks(2), {"a": {0, 1}, "b": set(), "c": set()}, 1 << 40, 1)
    cluster = Cluster(course)
    cluster.begin()
    assert cluster.gives == [(0, "a")]
    cluster.lose("a")
    cluster.run()
    assert course.left("b") == course.left("c") == 0


def test_nothing_is_carried_to_nobody() -> None:
    course = Course(chunks(1), {"a": set()}, 1 << 40, 2)
    assert course.next_give() == (0, "a", False)
    assert course.gave(0, "a") == []
    assert course.next_give() is None
    assert course.is_done


def test_a_slow_node_reads_less() -> None:
    course = course_of(20, "ab", window=20)
    gives = [course.next_give() for _ in range(4)]
    assert course.next_give() is None
    given: Counter[str] = Counter()
    for _ in range(16):
        step = next(g for g in gives if g is not None and g[1] == "a")
        gives.remove(step)
        given[step[1]] += 1
        course.gave(*step[:2])
        gives.append(course.next_give())
    assert given == {"a": 16}


def test_all_go_on_without_a_slow_node_which_is_served_last() -> None:
    course = course_of(8, window=2, gives_max=1)
    cluster = Cluster(course)
    asleep: list[tuple[int, str]] = []
    served_slow = False
    cluster.begin()
    while not course.is_done:
        asleep += [take for take in cluster.takes if take[1] == "c" and not served_slow]
        cluster.takes = [take for take in cluster.takes if take not in asleep]
        cluster.gives.sort(key=lambda give: give[1] == "c")
        if cluster.gives or cluster.takes:
            cluster.step()
        elif slow := course.laggards():
            assert slow == ["c"]
            course.set_aside(slow)
        else:
            assert course.left("a") == course.left("b") == 0
            served_slow = True
            cluster.takes, asleep = asleep, []
        cluster.begin()
    assert served_slow
    assert course.left("c") == 0


def test_one_that_is_full_gets_no_more() -> None:
    course = course_of(6)
    cluster = Cluster(course)
    course.full("c")
    cluster.run()
    assert course.left("a") == course.left("b") == 0
    assert course.left("c") > 0


def test_a_chunk_that_nobody_can_give_is_left_out() -> None:
    course = course_of(3, "ab")
    cluster = Cluster(course)
    cluster.begin()
    while not course.is_done:
        bad = [give for give in cluster.gives if give[0] == 1]
        for give in bad:
            cluster.gives.remove(give)
            course.gave_not(*give)
        if not bad:
            cluster.step()
        cluster.begin()
    assert course.left("a") == course.left("b") == 4 * MIB


@pytest.mark.parametrize("chunk_bytes", [MIB, 4 * MIB, 64 * MIB])
def test_chunks_hold_every_byte_once(chunk_bytes: int) -> None:
    files = [
        ("a", 0),
        ("b", 5),
        ("c", 70 * MIB + 1),
        ("d", MIB),
        *((f"s{i}", 9) for i in range(600)),
    ]
    found: dict[str, int] = {}
    for chunk in chunks_of(files, chunk_bytes)[0]:
        assert 0 < sum(piece.length for piece in chunk) <= chunk_bytes
        assert len(chunk) <= 256
        for piece in chunk:
            assert 1 <= piece.count <= 16
            assert piece.first * MIB == found.get(piece.path, 0)
            found[piece.path] = found.get(piece.path, 0) + piece.length
    assert found == {path: size for path, size in files if size}


@given(
    sizes=st.lists(st.integers(0, 40 * MIB), max_size=4),
    owned=st.lists(
        st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=3), max_size=3
    ),
    chunk_bytes=st.sampled_from([MIB, 4 * MIB, 64 * MIB]),
)
def test_all_blocks_of_a_chunk_are_on_the_same_nodes(
    sizes: list[int], owned: list[list[tuple[int, int]]], chunk_bytes: int
) -> None:
    files = [(str(i), size) for i, size in enumerate(sizes)]
    nodes: dict[str, dict[str, list[tuple[int, int]]]] = {}
    blocks_of: dict[str, set[tuple[str, int]]] = {}
    for number, runs in enumerate(owned):
        name = f"n{number}"
        nodes[name], blocks_of[name] = {}, set()
        for path, size in files[number % 2 :]:  # no node has all files
            present = {b for first, count in runs for b in range(first, first + count)}
            present &= set(range(-(-size // MIB)))
            blocks_of[name] |= {(path, block) for block in present}
            nodes[name][path] = [(block, 1) for block in sorted(present)]
    found, has = chunks_of(files, chunk_bytes, nodes)
    seen: Counter[tuple[str, int]] = Counter()
    for at, chunk in enumerate(found):
        assert 0 < sum(piece.length for piece in chunk) <= chunk_bytes
        blocks = {(p.path, b) for p in chunk for b in range(p.first, p.first + p.count)}
        seen.update(blocks)
        for name, own in blocks_of.items():
            assert (at in has[name]) == bool(blocks & own) == (blocks <= own)
    assert seen == {(path, b): 1 for path, size in files for b in range(-(-size // MIB))}
