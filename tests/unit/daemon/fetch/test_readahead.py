"""Readahead asks for the next bytes of a cursor: not twice, not too many, and none behind it."""

import random

from hypothesis import given
from hypothesis import strategies as st
from support.fakes import MIB

from ckptfs._daemon.fetch.readahead import CURSORS_MAX, Readahead
from ckptfs._model.blocks import BLOCK_BYTES, block_count
from ckptfs._model.formats.headers import Parts

WINDOW = 64 * MIB
REACH = 2 * MIB

lengths = st.integers(1, MIB)


@st.composite
def walks(draw: st.DrawFn) -> "tuple[int, list[tuple[int, int]]]":
    """A file size, and accesses in it: runs, small and large jumps, in both directions."""
    size = draw(st.integers(1, 256 * MIB))
    accesses: list[tuple[int, int]] = []
    position = 0
    for _ in range(draw(st.integers(1, 40))):
        step = draw(st.sampled_from(["on", "on", "on", "near", "far"]))
        if step == "near":
            position += draw(st.integers(-3 * MIB, 3 * MIB))
        elif step == "far":
            position = draw(st.integers(0, size - 1))
        position = min(max(position, 0), size - 1)
        length = min(draw(lengths), size - position)
        accesses.append((position, length))
        position += length
    return size, accesses


@given(walks(), st.integers(0, WINDOW))
def test_readahead_lies_in_the_file_and_ahead_of_the_access(
    walk: "tuple[int, list[tuple[int, int]]]", window: int
) -> None:
    size, accesses = walk
    readahead = Readahead(size, window)
    for offset, length in accesses:
        ahead = readahead.access(offset, length)
        if ahead:
            assert ahead.step == 1
            assert ahead.start > (offset + length - 1) // BLOCK_BYTES
            assert ahead.stop <= block_count(size)
            assert ahead.stop * BLOCK_BYTES <= offset + length + window + BLOCK_BYTES


@given(st.integers(0, 255 * MIB), lengths)
def test_readahead_of_a_first_touch_is_empty(offset: int, length: int) -> None:
    assert not Readahead(256 * MIB, WINDOW).access(offset, length)


@given(st.lists(lengths, min_size=2, max_size=120), st.integers(0, 20 * MIB))
def test_readahead_of_a_sequential_cursor_gets_no_block_twice(steps: list[int], start: int) -> None:
    size = 200 * MIB
    readahead = Readahead(size, WINDOW)
    position, next_block = start, 0
    for length in steps:
        ahead = readahead.access(position, length)
        position += length
        if ahead:
            assert ahead.start >= next_block
            next_block = ahead.stop


@given(st.integers(64 << 10, MIB), st.sampled_from([0, 4 * MIB, 16 * MIB, WINDOW]))
def test_readahead_from_the_start_grows_with_the_bytes_read(length: int, window_max: int) -> None:
    size = 300 * MIB
    readahead = Readahead(size, window_max)
    asked_to = 0
    for position in range(0, 200 * MIB, length):
        stop = position + length
        if ahead := readahead.access(position, length):
            asked_to = ahead.stop * BLOCK_BYTES
        window = min(stop * (4 if stop > 3 * MIB else 1), window_max)
        assert asked_to <= stop + window
        if position:  # it may lag by half of the window, and by the rounding to a block
            asked_or_read = max(asked_to, -(-stop // BLOCK_BYTES) * BLOCK_BYTES)
            assert asked_or_read > stop + window // 2 - BLOCK_BYTES


def test_readahead_from_the_start_asks_for_the_whole_file() -> None:
    size = 10 * MIB + 5
    readahead = Readahead(size, WINDOW)
    ranges = [readahead.access(position, MIB) for position in range(0, 10 * MIB, MIB)]
    ranges.append(readahead.access(10 * MIB, 5))
    asked = [block for ahead in ranges for block in ahead]
    assert asked == list(range(asked[0], block_count(size)))
    assert asked[0] <= 3


def test_readahead_of_an_eager_file_asks_for_a_whole_window() -> None:
    readahead = Readahead(300 * MIB, WINDOW, eager=True)
    assert readahead.access(0, MIB) == range(1, 1 + WINDOW // MIB)
    assert not readahead.access(200 * MIB, MIB)  # a cursor elsewhere has a small window
    small = Readahead(10 * MIB + 5, WINDOW, eager=True)
    assert small.access(0, 4096) == range(1, 11)


def test_readahead_of_copied_tensors_reads_the_file_through() -> None:
    """memcpy(3) of a mapped tensor touches its end first."""
    tensors = [(MIB + i * 32 * MIB, MIB + (i + 1) * 32 * MIB) for i in range(8)]
    parts = Parts(tuple(a for a, _ in tensors), tuple(b for _, b in tensors))
    readahead = Readahead(257 * MIB, WINDOW, parts)
    asked: set[int] = set()

    def copy(start: int, stop: int) -> None:
        asked.update(readahead.access(stop - MIB, 2 * MIB))
        for position in range(start, stop, MIB):
            asked.update(readahead.access(position, MIB))

    readahead.access(0, MIB)
    copy(*tensors[0])
    assert max(asked) < 36  # the first tensor alone proves nothing
    copy(*tensors[1])
    assert max(asked) >= 64 + 32
    for tensor in tensors[2:]:
        copy(*tensor)
    assert asked >= set(range(70, 257))
    assert readahead.is_asked_whole


def test_readahead_counts_a_mostly_read_file_as_read_whole() -> None:
    readahead = Readahead(20 * MIB, WINDOW)
    for position in range(0, 10 * MIB, MIB):
        readahead.access(position, MIB)
        assert not readahead.is_read_whole
    readahead.access(10 * MIB, MIB)
    assert readahead.is_read_whole
    small = Readahead(3 * MIB, WINDOW)
    small.access(0, 3 * MIB)
    assert not small.is_read_whole  # the kernel itself asks for as many bytes


def test_readahead_that_was_eager_in_vain_says_so() -> None:
    eager = Readahead(20 * MIB, WINDOW, eager=True)
    assert not eager.was_eager_in_vain  # no program has read
    eager.access(0, MIB)
    assert eager.was_eager_in_vain
    for position in range(MIB, 12 * MIB, MIB):
        eager.access(position, MIB)
    assert not eager.was_eager_in_vain


@given(st.integers(MIB, 64 * MIB), st.lists(lengths, min_size=1, max_size=150))
def test_readahead_elsewhere_is_a_block_and_a_sixteenth_or_a_quarter(
    start: int, steps: list[int]
) -> None:
    readahead = Readahead(400 * MIB, WINDOW)
    position = start
    for length in steps:
        ahead = readahead.access(position, length)
        position += length
        if ahead:
            run = position - start
            window = BLOCK_BYTES + run // 16 if run < 8 * MIB else run // 4
            assert ahead.stop * BLOCK_BYTES <= position + window


def test_readahead_elsewhere_begins_with_the_second_access() -> None:
    readahead = Readahead(400 * MIB, WINDOW)
    assert not readahead.access(100 * MIB, MIB)
    assert readahead.access(101 * MIB, MIB) == range(102, 103)


@given(st.data())
def test_readahead_of_interleaved_cursors_is_as_of_single_ones(data: st.DataObject) -> None:
    size = 2048 * MIB
    count = data.draw(st.integers(2, CURSORS_MAX))
    shared = Readahead(size, WINDOW)
    alone = [Readahead(size, WINDOW) for _ in range(count)]
    positions = [i * 60 * MIB for i in range(count)]
    for _ in range(data.draw(st.integers(1, 40))):  # no cursor gets to the start of the next one
        which = data.draw(st.integers(0, count - 1))
        length = data.draw(lengths)
        assert shared.access(positions[which], length) == alone[which].access(
            positions[which], length
        )
        positions[which] += length


@given(st.integers(0, 1000), st.sampled_from([128, 256, 512, 1024]))
def test_readahead_of_requests_out_of_order_has_one_cursor(seed: int, kib: int) -> None:
    piece = kib << 10
    order = list(range(0, 64 * MIB, piece))
    group = min(4, REACH // piece)  # the kernel has a few requests under way, in any order
    shuffle = random.Random(seed).shuffle
    for i in range(0, len(order), group):
        part = order[i : i + group]
        shuffle(part)
        order[i : i + group] = part
    readahead = Readahead(300 * MIB, WINDOW)
    asked: list[int] = []
    for offset in order:
        asked += readahead.access(offset, piece)
    assert asked == sorted(set(asked))  # a second cursor would ask again
    assert asked[-1] * BLOCK_BYTES >= 64 * MIB + 8 * MIB


@given(st.data(), st.booleans())
def test_readahead_of_processes_that_read_in_turn_has_one_cursor(
    data: st.DataObject, from_start: bool
) -> None:
    """Eight processes read each eighth MiB. They keep in step at first, because readahead takes a
    process far before the others for another reader until it knows that they are one."""
    size, first = 400 * MIB, 0 if from_start else 50
    readahead = Readahead(size, WINDOW)
    asked: list[int] = []
    reached = 0
    for turn in range(18):
        order = range(8) if turn < 6 else data.draw(st.permutations(range(8)))
        for index in order:
            block = first + 8 * turn + index
            asked += readahead.access(block * MIB, MIB)
            reached = max(reached, block + 1)
    assert len(readahead._cursors) == 1
    assert asked == sorted(set(asked))
    window = 64 if from_start else (reached - first) // 4
    assert asked[-1] + 1 >= reached + window - 8  # or else it is too early for the next request


def test_readahead_of_distant_readers_has_a_cursor_for_each() -> None:
    readahead = Readahead(400 * MIB, WINDOW)
    for position in range(0, 60 * MIB, MIB):
        readahead.access(position, MIB)
    for place in (43, 77):
        assert not readahead.access(place * MIB, MIB)
        assert readahead.access((place + 1) * MIB, MIB) == range(place + 2, place + 3)
    assert len(readahead._cursors) == 3


def test_readahead_of_a_mostly_read_file_has_large_windows() -> None:
    readahead = Readahead(400 * MIB, WINDOW)
    for position in range(50 * MIB, 300 * MIB, MIB):
        readahead.access(position, MIB)
    assert readahead.is_read_whole
    ahead = range(0)
    for position in range(0, 4 * MIB, MIB):
        ahead = readahead.access(position, MIB)
    assert ahead.stop == 4 + 4 * 4
    for position in range(320 * MIB, 324 * MIB, MIB):
        ahead = readahead.access(position, MIB)


def _places(count: int) -> list[int]:
    return [(8 + 16 * i) * MIB for i in range(count)]


def test_readahead_forgets_the_least_recently_used_cursor() -> None:
    readahead = Readahead(1024 * MIB, WINDOW)
    places = _places(CURSORS_MAX + 1)
    for place in places[:-1]:
        readahead.access(place, MIB)
    assert readahead.access(places[0] + MIB, MIB)  # the first one is in use again
    readahead.access(places[-1], MIB)  # one too many, so the second cursor goes
    assert readahead.access(places[0] + 2 * MIB, MIB)
    assert readahead.access(places[2] + MIB, MIB)
    assert not readahead.access(places[1] + MIB, MIB)


def test_readahead_forgets_the_bytes_of_a_forgotten_cursor() -> None:
    readahead = Readahead(1400 * MIB, WINDOW)
    for position in range(0, 701 * MIB, MIB):
        readahead.access(position, MIB)
    for index in range(CURSORS_MAX):
        assert readahead.is_read_whole
        readahead.access((720 + 20 * index) * MIB, 4096)
    assert not readahead.is_read_whole


def test_readahead_after_a_step_back_stays_on_its_cursor() -> None:
    readahead = Readahead(300 * MIB, WINDOW)
    reference = Readahead(300 * MIB, WINDOW)
    for offset in range(0, 32 * MIB, MIB):
        assert readahead.access(offset, MIB) == reference.access(offset, MIB)
        assert not readahead.access(max(0, offset - MIB), MIB)
